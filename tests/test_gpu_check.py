"""The dry run of tests/gpu works, and commands that fail, hang or have no time left are handled."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from gpu import buckets, check, plan, speed, unit, visit
from gpu.inside import Lab
from gpu.plan import Machine
from gpu.visit import CannotRun, Failed, Job, Row, Visit

from train.cli import parse
from train.functional import optim

HANG = ["sleep", "600"]


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def ended(tmp_path: Path, *jobs: Job, seconds: float = 60, at_once: int = 1) -> tuple[Visit, list[Row]]:
    """Run jobs as one stage; return the visit and its rows."""
    found = Visit(tmp_path / "output", tmp_path / "work", seconds)
    found.run(found.plan("stage", list(jobs)), at_once)
    return found, found.rows


def receipt(place: Path) -> dict[str, Any]:
    return json.loads((place / "receipt.json").read_text())


def test_command_that_works_is_ok_with_its_last_line_and_its_checks(tmp_path: Path) -> None:
    printed = ['{"check": "a", "ok": true, "us": 3.0, "host_us": 2.0}', "the end", "  more", '{"check": "b']
    code = f"print({chr(10).join(printed)!r})"
    found, (row,) = ended(tmp_path, Job("works", 30, python(code)))
    assert (row.outcome, row.note) == ("ok", "the end")
    assert row.checks == [{"check": "a", "ok": True, "us": 3.0, "host_us": 2.0}]
    assert receipt(found.output)["speeds"] == row.checks
    assert "3.0 us per step" in visit.table(receipt(found.output))


def test_command_that_fails_is_a_failed_row_and_the_others_run(tmp_path: Path) -> None:
    broken = Job("broken", 30, python("import sys; sys.exit('no luck')"))
    found, rows = ended(tmp_path, broken, Job("fine", 30, ["true"]))
    assert [(row.outcome, row.note) for row in rows] == [("FAIL", "exit code 1: no luck"), ("ok", "")]
    assert found.failed == rows[:1]


def test_command_that_hangs_fails_at_its_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(visit, "GRACE_SECONDS", 0.3)
    stubborn = ["bash", "-c", "trap '' TERM; echo waiting; while true; do sleep 0.1; done"]
    began = time.monotonic()
    _, rows = ended(tmp_path, Job("hangs", 0.5, HANG), Job("stubborn", 0.5, stubborn), Job("next", 30, ["true"]))
    assert time.monotonic() - began < 30
    assert [row.outcome for row in rows] == ["FAIL", "FAIL", "ok"]
    assert [row.note for row in rows[:2]] == ["did not end within 0.5 s: ", "did not end within 0.5 s: waiting"]


def test_nothing_that_a_command_started_outlives_it(tmp_path: Path) -> None:
    _, (row,) = ended(tmp_path, Job("leaves-one", 30, ["bash", "-c", "sleep 600 & echo $!"]))
    for _ in range(100):
        state = Path(f"/proc/{row.note}/stat")
        if not state.exists() or state.read_text().split()[2] == "Z":
            break
        time.sleep(0.05)
    else:
        raise AssertionError("the background process still runs")


def test_after_the_deadline_rows_record_that_no_time_was_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(visit, "MIN_SECONDS", 0.1)
    found, rows = ended(tmp_path, Job("long", 300, HANG), Job("late", 30, ["true"]), seconds=1)
    assert [row.outcome for row in rows] == ["-", "-"]
    assert rows[0].note.startswith("no time left: stopped after")
    assert rows[1].note == "no time left"
    assert not found.failed
    assert [row["note"] for row in receipt(found.output)["rows"]] == [row.note for row in rows]


def test_jobs_run_side_by_side(tmp_path: Path) -> None:
    def meet(mine: str, other: str) -> list[str]:
        return ["bash", "-c", f"touch {tmp_path}/{mine}; until [ -e {tmp_path}/{other} ]; do sleep 0.05; done"]

    _, rows = ended(tmp_path, Job("a", 30, meet("a", "b")), Job("b", 30, meet("b", "a")), at_once=2)
    assert [row.outcome for row in rows] == ["ok", "ok"]


def test_job_that_makes_no_sense_without_another_does_not_run_after_its_failure(tmp_path: Path) -> None:
    jobs = [Job("first", 30, ["false"]), Job("second", 30, ["true"], after="first"), Job("third", 30, ["true"])]
    _, rows = ended(tmp_path, *jobs)
    assert [row.outcome for row in rows] == ["FAIL", "-", "ok"]
    assert rows[1].note == "needs first, which is not ok"


def test_function_is_a_row_too(tmp_path: Path) -> None:
    def raises(error: Exception) -> Any:
        def work() -> str:
            raise error

        return work

    jobs = [
        Job("holds", 1, lambda: "fine"),
        Job("fails", 1, raises(Failed("other bits"))),
        Job("cannot", 1, raises(CannotRun("needs x"))),
        Job("not-here", 1, HANG, why_not="needs a GPU"),
    ]
    _, rows = ended(tmp_path, *jobs)
    found = [(row.outcome, row.note) for row in rows]
    assert found == [("ok", "fine"), ("FAIL", "other bits"), ("-", "needs x"), ("-", "needs a GPU")]


def stages(monkeypatch: pytest.MonkeyPatch, work: Any) -> None:
    """Make check.main run one job, and nothing that needs torch."""
    monkeypatch.setattr(check, "examine", lambda found, options: Machine("cpu", found.work))
    monkeypatch.setattr(check, "waves", lambda machine, parts: [("correct", [Job("only", 30, work)]), ("speed", [])])
    for name in ("XDG_CACHE_HOME", "TMPDIR"):  # main sets them
        monkeypatch.setenv(name, os.environ.get(name, ""))


@pytest.mark.parametrize(("command", "code", "outcome"), [(["true"], 0, "finished"), (["false"], 1, "failed")])
def test_exit_code_shows_whether_a_row_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str], code: int, outcome: str
) -> None:
    stages(monkeypatch, command)
    assert check.main(["--device", "cpu", "--output", str(tmp_path)]) == code
    assert receipt(tmp_path)["outcome"] == outcome
    assert sorted(path.name for path in tmp_path.iterdir()) == ["logs.tgz", "receipt.json"]


def test_interrupted_visit_leaves_a_receipt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted() -> str:
        raise KeyboardInterrupt

    stages(monkeypatch, interrupted)
    assert check.main(["--device", "cpu", "--output", str(tmp_path)]) == 1
    assert receipt(tmp_path)["outcome"] == "interrupted"
    assert receipt(tmp_path)["rows"][0]["note"] == "not reached"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_killed_visit_leaves_a_receipt(tmp_path: Path, number: signal.Signals) -> None:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-m", "gpu.check", "--device", "cpu", "--output", str(tmp_path)]
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        while not list(tmp_path.glob("gpu-check-*/logs/facts.log")):
            time.sleep(0.01)
        process.send_signal(number)
    assert process.returncode == (1 if number == signal.SIGTERM else -9)
    assert receipt(tmp_path)["outcome"] == "interrupted"


def test_compare_finds_other_bits(tmp_path: Path) -> None:
    for name, bits in (("a", "1"), ("b", "1"), ("c", "2")):
        (tmp_path / name).mkdir()
        summary = {"world_size": 1, "weights_sha256": "w", "fingerprints": {"sha256": bits}}
        (tmp_path / name / "summary.json").write_text(json.dumps(summary))
    assert "same bits" in plan.compare(tmp_path, ["a", "b"])
    with pytest.raises(Failed, match="other bits than a: c fingerprints"):
        plan.compare(tmp_path, ["a", "b", "c"])
    with pytest.raises(CannotRun, match="needs two trainings"):
        plan.compare(tmp_path, ["a", "missing"])


MACHINES = {
    "one GPU, old NCCL": Machine("cuda", Path("work"), 1, 80.0, (2, 28, 9)),
    "one GPU, NCCL unpacked": Machine("cuda", Path("work"), 1, 80.0, (2, 28, 9), "/tmp/libnccl.so.2", has_mnist=True),
    "two GPUs": Machine("cuda", Path("work"), 2, 80.0, (2, 28, 9), has_mnist=True),
}


def jobs_of(name: str) -> dict[str, Job]:
    return {job.name: job for _, jobs in plan.waves(MACHINES[name], [*plan.STAGES]) for job in jobs}


def test_ranks_share_the_only_gpu_and_otherwise_have_one_each() -> None:
    alone, unpacked, two = (jobs_of(name) for name in MACHINES)
    assert "needs NCCL 2.30 or a second GPU" in alone["nccl-every-2"].why_not
    assert "NCCL 2.28.9" in alone["nccl-every-2"].why_not
    assert alone["fast-graph-1"].why_not == plan.NO_MNIST
    assert alone["gloo-every-4"].env == {"LOCKSTEP_SHARE_GPU": "gloo"}
    assert not unpacked["nccl-every-4"].why_not
    assert unpacked["killed-rank"].env["LD_PRELOAD"] == "/tmp/libnccl.so.2"
    assert unpacked["nccl-every-2"].env["LOCKSTEP_SHARE_GPU"] == "nccl"
    assert not two["nccl-every-2"].why_not
    assert not two["nccl-every-2"].env
    assert two["nccl-every-3"].why_not == "needs 3 GPUs: this machine has 2"
    assert "NCCL exchanges" in two["gloo-every-2"].why_not


def test_alignment_check_fails_without_the_mend(monkeypatch: pytest.MonkeyPatch) -> None:
    """A norm that depends on the address, as CUDA's does, replaces a GPU."""
    norm, lab = torch._foreach_norm, Lab("cpu")

    def norm_by_address(tensors: list[torch.Tensor], *arguments: Any) -> list[torch.Tensor]:
        found = norm(tensors, *arguments)
        return [n * (1 + 1e-6) if t.data_ptr() % 16 else n for n, t in zip(found, tensors, strict=True)]

    assert buckets.unmended(lab)["norms_that_differ"] == 0
    monkeypatch.setattr(torch, "_foreach_norm", norm_by_address)
    found = buckets.unmended(lab)
    assert found["norms_that_differ"] == found["of"] > 0
    assert buckets.alignment(lab, "sgd")["ok"]
    monkeypatch.setattr(optim, "align_gradients", lambda parameters: None)
    assert not buckets.alignment(lab, "sgd")["ok"]


def test_every_training_of_a_visit_has_flags_that_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    lab = Lab("cuda")
    flags = [(name, " ".join(job.work[job.work.index("--") + 1 :])) for name, job in jobs_of("two GPUs").items()
             if isinstance(job.work, list) and "run" in job.work]  # fmt: skip
    for group in [made() for made in unit.groups(lab, []).values()] + [speed.cases(lab)]:
        texts = [(name, each) for name, work in group for each in getattr(work, "args", ()) if isinstance(each, str)]
        flags += [(name, f"{lab.flags} {text}") for name, text in texts if text.startswith("--")]
    assert len(flags) > 60
    for name, text in flags:
        assert parse(text.split()), name


@pytest.mark.slow
def test_dry_run_on_a_cpu(tmp_path: Path) -> None:
    """This starts the whole script as a user does."""
    environment = {name: value for name, value in os.environ.items() if name not in ("OUT", "MNIST_ROOT")}
    command = ["bash", "tests/gpu/check.sh", "--device", "cpu", "--output", str(tmp_path)]
    done = subprocess.run(
        command, cwd=ROOT, env={**environment, "PYTHON": sys.executable}, capture_output=True, text=True, timeout=580
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = receipt(tmp_path)
    rows = {row["name"]: row for row in found["rows"]}
    assert found["outcome"] == "finished"
    assert {row["outcome"] for row in rows.values()} == {"ok", "-"}
    assert {name for name, row in rows.items() if row["outcome"] == "ok"} >= {
        *("facts", "quickstart", "every-1", "gloo-every-2", "gloo-bits", "modes", "numbers", "doctor", "accelerate-2"),
        *("killed-rank", "speeds", "fast-graph-1", "fast-99.5-graph", "throughput"),
    }
    reasons = {row["note"] for row in rows.values() if row["outcome"] == "-"}
    assert all(reason.startswith(("needs ", "not in the dry run: ")) for reason in reasons), reasons
    assert {rows[name]["note"] for name in ("graphs", "waits", "nccl-every-2")} == {"needs a GPU"}
    assert {check["check"] for check in rows["numbers"]["checks"]} >= {"alignment, adamw", "exact tree behind DDP"}
    assert {run["name"] for run in found["trainings"]} >= {"quickstart", "gloo-every-2", "fast-graph-1"}
    assert {speed["check"] for speed in found["speeds"]} == {"bare", "fast ordinary"}
    assert {"python", "torch", "accelerate"} <= found["versions"].keys()
    assert "failed" in done.stdout.splitlines()[-2]
    assert not any(str(ROOT) in json.dumps(run) for run in found["trainings"])
