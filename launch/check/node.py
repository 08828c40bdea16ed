"""What one node of a cluster says of itself: started by `srun` from cluster.py, which talks to it by lines of JSON.

Standard library only, so that it answers even where the environment is broken. Lines in: {"connect": [host, port]}, then
any number of {"ping": n}. Lines out: one greeting, then one answer to each line in.
"""

import contextlib
import fcntl
import json
import os
import socket
import struct
import sys
import time
from pathlib import Path

SIOCGIFADDR = 0x8915  # ioctl: an interface's IPv4 address
TOKEN_SECONDS, CONNECT_SECONDS = 10.0, 5.0  # network file systems show a new file late


def addresses() -> dict[str, str]:
    """The IPv4 address of each network interface that has one."""
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):
                answer = fcntl.ioctl(probe.fileno(), SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                found[name] = socket.inet_ntoa(answer[20:24])
    return found


def check_token(path: Path, content: str, rank: int) -> str:
    """Return "" if the shared file is seen with its content and one can be written beside it; otherwise why not."""
    deadline = time.monotonic() + TOKEN_SECONDS
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    try:
        if path.read_text() != content:
            return "holds something else"
        path.with_name(f"{path.name}.{rank}").write_text(content)
    except OSError as error:
        return error.strerror or str(error)
    return ""


def connect(host: str, port: int) -> dict[str, object]:
    """Connect to the first node as ranks will do; say from which interface, or why it fails."""
    try:
        with socket.create_connection((host, port), CONNECT_SECONDS) as connection:
            own = connection.getsockname()[0]
    except OSError as error:
        return {"error": str(error)}
    names = [name for name, address in addresses().items() if address == own]
    return {"address": own, "interface": names[0] if names else "", "error": ""}


def main() -> int:
    """Greet, then answer until the input ends."""
    token, content = Path(sys.argv[1]), sys.argv[2]
    rank = int(os.environ.get("SLURM_PROCID", "0"))
    with socket.create_server(("", 0)) as server:
        wanted = os.environ.get("GLOO_SOCKET_IFNAME", "")
        name = os.environ.get("SLURMD_NODENAME", socket.gethostname())
        greeting = {"host": name, "port": server.getsockname()[1], "token": check_token(token, content, rank)}
        greeting["absent"] = wanted if wanted and wanted not in [name for _, name in socket.if_nameindex()] else ""
        print(json.dumps({"rank": rank, **greeting}), flush=True)
        for line in sys.stdin:
            order = json.loads(line)
            answer = connect(*order["connect"]) if "connect" in order else {"ping": order["ping"], "time": time.time()}
            print(json.dumps({"rank": rank, **answer}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
