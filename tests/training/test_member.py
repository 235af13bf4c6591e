"""A worker's side of its quorum: it enters what it is told, steps only with a lease, and leaves what is over."""

import threading
from collections.abc import Callable

import pytest
import torch

from tidepool.training.group import QuorumLost
from tidepool.training.member import Member
from tidepool.training.membership import Directive, Number, Quorum, Report, WorkerId
from tidepool.training.process_group import MeetingPoint
from tidepool.training.quorum import Rules
from tidepool.training.straggling import WINDOW

WORKER = WorkerId(1, 0)
WAIT_S = 30
RULES = Rules(lease_s=0.4)


def quorum(count: int) -> Quorum:
    return Quorum(Number(0, count), (WORKER,), "", 0, None, (), 1, None, from_base=True)


class Answers:
    """A quorum that answers what the test wants, and remembers what was reported."""

    def __init__(self) -> None:
        self.answer: Callable[[Report], Directive] = lambda report: Directive(report.sequence, 0)
        self.reports: list[Report] = []
        self.answered = threading.Condition()

    def __call__(self, report: Report) -> Directive:
        directive = self.answer(report)
        with self.answered:
            self.reports.append(report)
            self.answered.notify_all()
        return directive

    def wait_for(self, num: int) -> None:
        with self.answered:
            assert self.answered.wait_for(lambda: len(self.reports) >= num, WAIT_S)


def member_of(answers: Answers) -> Member:
    return Member(Report(WORKER, 0, 1, ""), MeetingPoint("127.0.0.1"), torch.device("cpu"), answers, RULES)


def member_in(count: int = 1) -> Directive:
    return Directive(0, 0, quorum(count), over=Number(0, count - 1), is_leased=True)


def with_sequence(directive: Directive) -> Callable[[Report], Directive]:
    return lambda report: Directive(report.sequence, 0, directive.quorum, directive.over, directive.is_leased)


def test_it_enters_a_quorum_once_and_leaves_it_when_it_is_over() -> None:
    answers = Answers()
    answers.answer = with_sequence(member_in())
    with member_of(answers) as member:
        assert member.wait_for_quorum() == quorum(1)
        member.check()
        answers.answer = with_sequence(member_in(2))
        answers.wait_for(len(answers.reports) + 2)  # the first of them was answered anew before the second was sent
        with pytest.raises(QuorumLost, match=r"0\.1 is over"):
            member.check()
        assert member.wait_for_quorum() == quorum(2)
        answers.wait_for(len(answers.reports) + 2)
    assert answers.reports[-1].quorum == quorum(2)
    assert answers.reports[-1].over == Number(0, 1)
    sequences = [report.sequence for report in answers.reports]
    assert sequences == sorted(set(sequences))


def test_without_a_lease_it_waits_and_with_one_it_goes_on() -> None:
    answers, passed = Answers(), threading.Event()
    answers.answer = with_sequence(Directive(0, 0, quorum(1)))
    with member_of(answers) as member:
        member.wait_for_quorum()
        waiting = threading.Thread(target=lambda: (member.check(), passed.set()), daemon=True)
        waiting.start()
        answers.wait_for(len(answers.reports) + 3)
        assert not passed.is_set()
        answers.answer = with_sequence(member_in())
        assert passed.wait(WAIT_S)


def test_a_quorum_that_cannot_be_reached_is_asked_again() -> None:
    answers, tried = Answers(), threading.Semaphore(0)

    def nobody(_: Report) -> Directive:
        tried.release()
        raise ConnectionError("nobody there")

    answers.answer = nobody
    with member_of(answers) as member:
        for _ in range(3):
            assert tried.acquire(timeout=WAIT_S)
        answers.answer = with_sequence(member_in())
        assert member.wait_for_quorum() == quorum(1)
        member.check()


def test_it_ends_when_it_is_no_longer_wanted() -> None:
    answers = Answers()
    answers.answer = lambda report: Directive(report.sequence, 0, leave=True)
    with member_of(answers) as member:
        assert member.wait_for_quorum() is None


def test_it_reports_its_usual_time_for_a_shard_once_it_has_taken_enough_steps() -> None:
    answers = Answers()
    answers.answer = with_sequence(member_in())
    with member_of(answers) as member:
        member.wait_for_quorum()
        member.tick("step")
        for step in range(WINDOW - 1):
            member.holds(step, "x", float(step))
        answers.wait_for(len(answers.reports) + 2)
        assert answers.reports[-1].shard_s == 0.0
        member.holds(WINDOW, "x", WINDOW - 1.0)
        answers.wait_for(len(answers.reports) + 2)
    assert answers.reports[-1].shard_s == (WINDOW - 1) / 2
