"""Software that differs between nodes is named with the node."""

from importlib.metadata import version

import pytest

from tidepool.errors import VersionSkewError
from tidepool.training.versions import check_versions, installed_versions


def test_the_same_software_passes_and_other_software_is_named_with_its_node() -> None:
    here = installed_versions()
    check_versions(here, dict(here), "10.0.0.7 (ab12)")
    with pytest.raises(VersionSkewError) as caught:
        check_versions(here, here | {"torch": "1.0", "peft": "none"}, "10.0.0.7 (ab12)")
    text = str(caught.value)
    assert text.startswith("Node 10.0.0.7 (ab12) has other software")
    assert f"torch: {here['torch']} -> 1.0" in text
    assert f"peft: {here['peft']} -> none" in text
    assert "ray" not in text.splitlines()[1:3]
    assert "requirements.lock" in text


def test_it_compares_what_is_installed_but_not_how_torch_was_built() -> None:
    here = installed_versions()
    assert here["torch"] == version("torch").partition("+")[0]
    assert here["transformers"] == version("transformers")
    assert "none" not in here.values()
