"""A W&B server for tests: the part of its protocol that init, log, resume, rewind, artifacts and sweeps use.

It keeps what it gets, per run. After `awake.clear()` it accepts requests but does not answer. After `stop()` it
refuses connections. `start()` listens on the same port again, with everything it kept. It checks no key.
"""

import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from ranks.processes import launch, rows

from train.tracking.wandb import SHOWN

USER = "tester"
KEY = "5ec2e7" * 7
SHORT = "--train.max_steps 20 --log.every_steps 5 --eval.every_steps 10 --checkpoint.every_steps 10"
PATIENT = "--wandb.timeout 100"  # this machine may be busy
TIMEOUT_SECONDS = 60.0


class Refused(Exception):
    """An error message for the client."""


@dataclass
class ServedRun:
    """The data that the server keeps of a run."""

    fields: dict[str, Any] = field(default_factory=dict)  # the last value of each field of its upserts
    history: list[dict[str, Any]] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)  # system metrics
    summary: dict[str, Any] = field(default_factory=dict)
    exit_code: int | None = None
    preempting: bool = False

    @property
    def config(self) -> dict[str, Any]:
        return {name: item["value"] for name, item in json.loads(self.fields["config"]).items()}

    def rows(self) -> list[dict[str, Any]]:
        """Return the history without wandb's own fields."""
        return [{name: value for name, value in row.items() if not name.startswith("_")} for row in self.history]


class _Http(ThreadingHTTPServer):
    request_queue_size = 256  # wandb opens a connection per file; a full backlog would cost it seconds of retries
    daemon_threads = True

    def handle_error(self, *arguments: Any) -> None:
        """Print nothing about clients that were killed. The server's own errors are kept in `faults`."""


class Server:
    """A server on its own port. A context manager."""

    def __init__(self) -> None:
        self.runs: dict[str, ServedRun] = {}
        self.artifacts: list[dict[str, Any]] = []
        self.files: dict[str, bytes] = {}
        self.rewinds = True  # a real server may not offer that
        self.operations: list[str] = []
        self.faults: list[str] = []
        self.sweep = ""  # the YAML of the only one
        self.commands: list[dict[str, Any]] = []  # for an agent, one after the other
        self.port = 0
        self.start()

    def start(self) -> None:
        """Listen, on the same port as before if there was one."""
        self.http = _Http(("127.0.0.1", self.port), type("Handler", (_Handler,), {"server_state": self}))
        self.port = self.http.server_port
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()
        self.awake = threading.Event()
        self.awake.set()

    def stop(self) -> None:
        """Refuse connections and requests from now on."""
        self.http.shutdown()
        self.http.server_close()

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        self.awake.set()
        self.stop()

    @property
    def env(self) -> dict[str, str]:
        return {"WANDB_BASE_URL": f"http://127.0.0.1:{self.port}", "WANDB_MODE": ""}

    @property
    def run(self) -> ServedRun:
        """The only run."""
        (run,) = self.runs.values()
        return run

    def graphql(self, query: str, variables: dict[str, Any]) -> Any:
        """Return the `data` of an answer. An unknown operation is a fault."""
        operation = re.search(r"(?:query|mutation)\s+(\w+)", query).group(1)  # type: ignore[union-attr]
        self.operations.append(operation)
        return getattr(self, f"_{operation}")(variables)

    def bucket(self, name: str) -> dict[str, Any]:
        """Return a run as the protocol shows it."""
        run = self.runs[name]
        project = {"id": "p", "name": run.fields["project"], "entity": {"id": "e", "name": USER}}
        shown = {
            "displayName": run.fields.get("displayName"),
            "description": None,
            "sweepName": None,
            "project": project,
        }
        return {"id": name, "name": name, "config": run.fields["config"], "historyLineCount": len(run.history), **shown}

    def _Viewer(self, variables: dict) -> Any:
        return {"viewer": {"id": "u", "entity": USER, "username": USER, "flags": "{}", "teams": {"edges": []}}}

    def _ServerFeaturesQuery(self, variables: dict) -> Any:
        return {"serverInfo": {"features": []}}

    def _OrganizationCoreWeaveOrganizationID(self, variables: dict) -> Any:
        return {"entity": {"organization": {"coreWeaveOrganizationId": None}}}

    def _RunResumeStatus(self, variables: dict) -> Any:
        run = self.runs.get(variables["name"])
        bucket = None
        if run:
            tail = json.dumps([json.dumps(row) for row in run.history[-1:]])
            texts = {
                "summaryMetrics": json.dumps(run.summary),
                "historyTail": tail,
                "eventsTail": "[]",
                "wandbConfig": '{"t": 1}',
            }
            counts = {"logLineCount": 0, "eventsLineCount": len(run.events), "tags": [], "notes": None}
            bucket = self.bucket(variables["name"]) | texts | counts
        return {
            "model": {"id": "p", "name": variables["project"], "entity": {"id": "e", "name": USER}, "bucket": bucket}
        }

    def _UpsertBucket(self, variables: dict) -> Any:
        inserted = variables["name"] not in self.runs
        run = self.runs.setdefault(variables["name"], ServedRun())
        run.fields |= {name: value for name, value in variables.items() if value is not None}
        return {"upsertBucket": {"bucket": self.bucket(variables["name"]), "inserted": inserted}}

    def _RewindRun(self, variables: dict) -> Any:
        if not self.rewinds:
            raise Refused("rewinding is not enabled")
        history = self.runs[variables["runName"]].history
        assert variables["metricName"] == "_step"
        assert 0 <= variables["metricValue"] < len(history)
        del history[int(variables["metricValue"]) + 1 :]
        return {"rewindRun": {"rewoundRun": self.bucket(variables["runName"])}}

    def _UpsertSweep(self, variables: dict) -> Any:
        self.sweep = variables["config"]
        project = {"id": "p", "name": variables["projectName"], "entity": {"id": "e", "name": USER}}
        return {"upsertSweep": {"sweep": {"name": "sweep-id", "project": project}, "configValidationWarnings": []}}

    def _SweepWithRuns(self, variables: dict) -> Any:
        return {"project": {"sweep": {"id": "s", "name": "sweep-id", "config": self.sweep, "runs": {"edges": []}}}}

    def _CreateAgent(self, variables: dict) -> Any:
        return {"createAgent": {"agent": {"id": "agent-id"}}}

    def _Heartbeat(self, variables: dict) -> Any:
        """Give an agent the next of `commands`, or none while it trains."""
        commands = [] if json.loads(variables["runState"]) else self.commands[:1]
        del self.commands[: len(commands)]
        return {"agentHeartbeat": {"agent": {"id": "agent-id"}, "commands": json.dumps(commands)}}

    def _CreateRunFiles(self, variables: dict) -> Any:
        files = [{"name": name, "uploadUrl": self._upload_url(name)} for name in variables["files"]]
        return {"createRunFiles": {"runID": variables["run"], "uploadHeaders": [], "files": files}}

    def _ArtifactType(self, variables: dict) -> Any:
        return {"project": {"artifact": None}}

    def _CreateArtifact(self, variables: dict) -> Any:
        """Commit contents with a known digest at once, like the real server."""
        wanted = variables["input"]
        known = [item["digest"] for item in self.artifacts]
        state = "COMMITTED" if wanted["digest"] in known else "PENDING"
        if state == "PENDING":
            self.artifacts.append(wanted)
        artifact = {"id": wanted["digest"], "state": state, "artifactSequence": {"id": "s", "latestArtifact": None}}
        return {"createArtifact": {"artifact": artifact}}

    def _CreateArtifactManifest(self, variables: dict) -> Any:
        file = {"id": "f", "uploadUrl": self._upload_url("manifest-" + variables["digest"]), "uploadHeaders": []}
        return {"createArtifactManifest": {"artifactManifest": {"id": "m", "file": file}}}

    _UpdateArtifactManifest = _CreateArtifactManifest

    def _CreateArtifactFiles(self, variables: dict) -> Any:
        edges = []
        for wanted in variables["input"]["artifactFiles"]:
            place = {
                "storagePath": None,
                "uploadUrl": self._upload_url("artifact/" + wanted["name"]),
                "uploadHeaders": [],
            }
            edges.append({"node": {**place, "uploadMultipartUrls": None, "artifact": {"id": wanted["artifactID"]}}})
        return {"createArtifactFiles": {"files": {"edges": edges}}}

    def _CommitArtifact(self, variables: dict) -> Any:
        return {"commitArtifact": {"artifact": {"id": variables["artifactID"], "digest": variables["artifactID"]}}}

    def _upload_url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.port}/upload/{name}"

    def stream(self, name: str, sent: dict[str, Any]) -> None:
        """Keep lines of history, system metrics and summary, each at its offset."""
        run = self.runs[name]
        for file, part in sent.get("files", {}).items():
            lines = [json.loads(line) for line in part["content"]] if file != "output.log" else []
            if file == "wandb-summary.json":
                run.summary = lines[-1]
            elif lines:
                kept = run.history if file == "wandb-history.jsonl" else run.events
                assert part["offset"] <= len(kept), f"{file}: a gap before line {part['offset']}"
                kept[part["offset"] : part["offset"] + len(lines)] = lines
        run.preempting |= bool(sent.get("preempting"))
        if sent.get("complete"):
            run.exit_code = sent["exitcode"]


class _Handler(BaseHTTPRequestHandler):
    server_state: Server
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: Any) -> None:
        """Print nothing."""

    def do_POST(self) -> None:
        body = self._body()
        try:
            if self.path == "/graphql":
                request = json.loads(body)
                self._send({"data": self.server_state.graphql(request["query"], request.get("variables") or {})})
            elif self.path.endswith("/file_stream"):
                self.server_state.stream(self.path.split("/")[-2], json.loads(body))
                self._send({})
            else:  # telemetry
                self._send({})
        except Refused as error:
            self._send({"errors": [{"message": str(error)}]})
        except (LookupError, AttributeError, AssertionError, TypeError) as error:
            self.server_state.faults.append(f"{type(error).__name__}: {error}")
            self.send_error(500)

    def do_PUT(self) -> None:
        self.server_state.files[self.path.removeprefix("/upload/")] = self._body()
        self._send({})

    def do_GET(self) -> None:
        self._body()
        self._send({})

    def _body(self) -> bytes:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server_state.awake.wait(TIMEOUT_SECONDS)
        return body

    def _send(self, answer: Any) -> None:
        content = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


def expected(run: Path) -> list[dict[str, Any]]:
    """Return the numbers that W&B must show, row by row, made from metrics.jsonl by rules of this test's own."""
    found = []
    for row in rows(run):
        if row["event"] in SHOWN:
            group = "eval_ema" if row.get("ema") else row["event"]
            numbers = {
                f"{group}/{name}": value
                for name, value in row.items()
                if type(value) in (int, float) and name != "time"
            }
            found.append({"step": row["step"], **numbers})
            del found[-1][f"{group}/step"]
    return found


def is_end(row: dict[str, Any]) -> bool:
    """Return whether a row of W&B is the one of summary.json."""
    return any(name.startswith("finished/") for name in row)


def numbers(shown: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the numbers of W&B's rows, without the one of summary.json."""
    return [
        {name: value for name, value in row.items() if type(value) in (int, float)} for row in shown if not is_end(row)
    ]


def sync(run: Path, env: dict[str, str]) -> str:
    """Return what `python -m launch sync RUN` prints."""
    code, shown = launch(run.parent / "sync.log", f"sync {run}", **env)
    assert code == 0, shown
    return shown
