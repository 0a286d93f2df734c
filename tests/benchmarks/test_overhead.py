import pytest

from vllm_kvcompress.bench import overhead
from vllm_kvcompress.bench.overhead import ACCOUNTING, VLLM, Clock, Step


@pytest.fixture
def time(monkeypatch):
    """A clock that only moves when told to."""

    class Time:
        now = 0.0

        def spend(self, seconds: float) -> None:
            self.now += seconds

    time = Time()
    monkeypatch.setattr(overhead, "perf_counter", lambda: time.now)
    return time


def test_what_an_override_passes_on_to_its_base_is_the_base_s_time(time):
    class Base:
        def allocate(self):
            time.spend(5)

        def untouched(self):
            time.spend(7)

    class Ours(Base):
        def allocate(self):
            time.spend(1)
            super().allocate()
            time.spend(2)

        def own(self):
            time.spend(11)

    clock = Clock()
    clock.wrap_overrides(Ours, ACCOUNTING)
    ours = Ours()
    ours.allocate()
    ours.untouched()
    seconds, calls = clock.lap()
    assert seconds == {ACCOUNTING: 3, VLLM: 5 + 7}
    assert calls == {ACCOUNTING: 1, VLLM: 1}


def test_time_is_charged_also_when_a_call_raises(time):
    def fail():
        time.spend(4)
        raise KeyError

    clock = Clock()
    with pytest.raises(KeyError):
        clock.timed(fail, ACCOUNTING)()
    time.spend(1)
    assert clock.lap()[0] == {ACCOUNTING: 4, VLLM: 1}


def test_a_lap_starts_from_zero(time):
    clock = Clock()
    time.spend(3)
    clock.lap()
    time.spend(2)
    assert clock.lap()[0] == {VLLM: 2}


def test_a_share_is_of_the_whole_step():
    step = Step(prompt_tokens=0, running=4, seconds={VLLM: 9.0, ACCOUNTING: 1.0})
    assert step.share(ACCOUNTING) == 0.1
    assert step.share(ACCOUNTING, "nothing") == 0.1
