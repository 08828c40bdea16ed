"""Make the doctor's checks of precision and of repeated trainings fail on purpose."""

import pytest
from ranks.processes import Forked
from test_doctor import look

from launch.check import checks, selftest

CPU = "--train.device cpu"


def test_precision() -> None:
    for precision, status in (("fp32", "OK"), ("bf16", "OK"), ("tf32", "fail"), ("fp16", "fail")):
        assert look(checks.precision, CPU, f"--train.precision {precision}").status == status


@pytest.mark.parametrize(
    ("mutant", "expected"),
    [
        ("accidents.noisy_gradients", "two runs have different bits"),
        ("accidents.noisy_bf16", "two runs have different bits"),
        ("accidents.undetermined_operation", "deterministic"),
    ],
)
def test_kernels_that_are_not_deterministic(mutant: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = f"{CPU} --train.precision bf16"
    monkeypatch.setattr(selftest, "Ranks", lambda *arguments, **options: Forked(mutant, *arguments, **options))
    finding = look(checks.deterministic, config)
    assert finding.status == "warn"  # fast mode guarantees nothing
    finding = look(checks.deterministic, config, "--train.exact true --train.num_micro_batches 2")
    assert finding.status == "fail"
    assert expected in finding.text


def test_repeated_trainings_that_are_the_same_and_that_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selftest, "Ranks", lambda *arguments, **options: Forked("", *arguments, **options))
    tiny = f"{CPU} --model.name tiny_bn --train.num_micro_batches 2 --run.resume /no/such --train.max_steps 900"
    finding = look(checks.deterministic, tiny)
    assert (finding.status, finding.text) == ("OK", "3 steps of tiny_bn in fp32: the same bits twice")
    monkeypatch.undo()
    monkeypatch.setattr(checks, "PROCESS_SECONDS", 0.2)
    finding = look(checks.deterministic, tiny, "--train.exact true")
    assert (finding.status, finding.text) == ("fail", "1 process(es) did not end within 0.2 s")
