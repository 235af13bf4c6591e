"""How an S3 server is reached, and which one the session has."""

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # benchmarks use this module too
    import pytest


@dataclass(frozen=True)
class S3Server:
    """An S3 endpoint and the keys of a user who may make buckets there."""

    endpoint_url: str
    access_key: str
    secret_key: str

    @property
    def environment(self) -> dict[str, str]:
        """The variables with which every AWS tool opens it."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint_url,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_REGION": "us-east-1",
        }

    def client(self, service: str = "s3", **options: Any) -> Any:
        """A boto3 client of a service of this server; `options` are botocore's."""
        import boto3
        from botocore.config import Config

        return boto3.client(
            service,
            region_name="us-east-1",
            endpoint_url=self.endpoint_url,
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            config=Config(**options),
        )

    def create_bucket(self, name: str) -> None:
        """Make a bucket."""
        self.client().create_bucket(Bucket=name)


def is_ceph(config: "pytest.Config") -> bool:
    """Whether the session's S3 server is a Ceph."""
    return config.getoption("--s3") == "ceph"


def set_environment(monkeypatch: "pytest.MonkeyPatch", server: S3Server, **changes: str) -> None:
    """Set the variables that open a server, and no others of AWS; `changes` replace or add some."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in (server.environment | changes).items():
        monkeypatch.setenv(name, value)
