"""What the policy must remember of a run, from one change of what it holds to the next. Pure.

Invariants:
- Between changes nothing is written: the policy counts on by itself from `as_of_s` (see `messages.Run`).
- `resized_s`, from which a run does not grow for a while, is set where it gave room to another run. Where serving took the room,
  or a node went, it takes back what is free at once: nobody else gains by its waiting.
"""

from dataclasses import replace

from tidepool.messages import Account


def new_account(now_s: float, submitted_s: float | None = None) -> Account:
    """That of a run which holds nothing and waits since it was submitted, or since now."""
    since_s = now_s if submitted_s is None else submitted_s
    return Account(since_s, since_s, as_of_s=now_s)


def count_on(account: Account, num_groups: int, min_groups: int, gpus_per_group: int, now_s: float, window_s: float) -> Account:
    """Count what was held until now: `num_groups`, since `as_of_s`."""
    seconds = max(0.0, now_s - account.as_of_s)
    dropped_s = min(seconds, max(0.0, now_s - account.submitted_s - window_s))
    held_s = account.held_s - dropped_s * min(1.0, account.held_s / window_s)  # as if the pauses were spread evenly over the window
    return replace(
        account,
        held_s=held_s + (seconds if num_groups >= min_groups else 0.0),
        used_gpu_s=account.used_gpu_s + num_groups * gpus_per_group * seconds,
        as_of_s=now_s,
    )


def change(account: Account, had: int, has: int, min_groups: int, now_s: float, gave: bool = False) -> Account:
    """What is held changes from `had` to `has` groups; `gave`: for another run. Count until now first (`count_on`)."""
    if has < min_groups:
        waiting_since_s = now_s if had >= min_groups or account.waiting_since_s is None else account.waiting_since_s
    else:
        waiting_since_s = None
    return replace(
        account,
        waiting_since_s=waiting_since_s,
        started_s=now_s if has >= min_groups > had else account.started_s,
        resized_s=now_s if gave else account.resized_s,
    )
