"""Content says what data are: not names, packing or the level of a folder that a root names."""

import errno
import fcntl
import gc
import gzip
import hashlib
import http.server
import socket
import ssl
import threading
import urllib.request
from collections.abc import Callable, Iterator
from http.client import RemoteDisconnected
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torchvision.datasets

from launch.__main__ import main as launch
from launch.check import checks
from train.cli import parse
from train.config import DataConfig
from train.errors import UserError
from train.storage import built_in, data

MNIST_SHA256 = "2c3caa71b3aa4e51b9c1a979edfa9e62e586ff3155cb59dfe526d7af40e9a699"
IDX_NAMES = ("mnist", "fashion_mnist", "kmnist")


def idx(array: np.ndarray) -> bytes:
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    return header + array.astype(np.uint8).tobytes()


def contents(seed: int) -> dict[str, bytes]:
    """Return the unpacked files of a tiny data set."""
    generator = np.random.default_rng(seed)
    return {
        name: idx(generator.integers(0, 10, (20, 28, 28) if "images" in name else 20)) for name in built_in.IDX_FILES
    }


TINY, OTHER = contents(0), contents(1)


def save(folder: Path, name: str, content: bytes) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


@pytest.fixture(autouse=True)
def tiny_mnist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Let a tiny data set be MNIST; the returned function ends that. The cache is empty."""
    published = built_in.MNIST_MD5
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(built_in, "MNIST_MD5", [hashlib.md5(content).hexdigest() for content in TINY.values()])
    return lambda: monkeypatch.setattr(built_in, "MNIST_MD5", published)


def prepared(root: Path | str | None, name: str = "mnist") -> data.Prepared:
    return data.prepare(DataConfig(name=name, root=root and str(root), download=False))


def refusal(root: Path, name: str = "mnist") -> str:
    with pytest.raises(UserError) as error:
        prepared(root, name)
    assert "\n" not in str(error.value)
    return str(error.value)


def plain(name: str) -> str:
    return name.removesuffix(".gz")


def dotted(name: str) -> str:
    return plain(name).replace("-idx", ".idx")


# how a program may have left a file: its name, and what is in it
FORMS: dict[str, Callable[[str, bytes], tuple[str, bytes]]] = {
    "as published": lambda name, content: (name, gzip.compress(content, mtime=0)),
    "packed again": lambda name, content: (name, gzip.compress(content, 1, mtime=7)),
    "packed in name only": lambda name, content: (name, content),
    "packed without the name": lambda name, content: (plain(name), gzip.compress(content)),
    "unpacked": lambda name, content: (plain(name), content),
    "dotted": lambda name, content: (dotted(name), content),
    "dotted and packed": lambda name, content: (f"{dotted(name)}.gz", gzip.compress(content)),
    "in a folder of its name": lambda name, content: (f"{plain(name)}/{plain(name)}", content),
    "7-Zip's folder": lambda name, content: (f"{plain(name)}/{dotted(name)}", content),
    "packed in a folder": lambda name, content: (f"{plain(name)}/{name}", gzip.compress(content)),
    "of several kinds": lambda name, content: (
        (name, gzip.compress(content)) if "images" in name else (dotted(name), content)
    ),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("level", ["MNIST/raw", "."])
def test_a_data_set_is_the_same_however_its_files_are_packed_and_named(level: str, form: str, tmp_path: Path) -> None:
    for name, content in TINY.items():
        save(tmp_path / "root" / level, *FORMS[form](name, content))
    found, sha256 = prepared(tmp_path / "root")
    assert found.tensors["train_images"].numpy().tobytes() == TINY[built_in.IDX_FILES[0]][16:]
    assert sha256 == data.content_sha256(found.tensors)
    for name, content in TINY.items():
        save(tmp_path / "published", *FORMS["as published"](name, content))
    assert prepared(tmp_path / "published")[1] == sha256


@pytest.mark.mnist
@pytest.mark.parametrize("form", ["packed again", "unpacked", "dotted"])
def test_mnist_is_the_same_however_it_is_packed_and_named(
    form: str, tmp_path: Path, mnist_root: Path, tiny_mnist: Callable[[], None]
) -> None:
    tiny_mnist()
    folder = built_in.find_folder(DataConfig(root=str(mnist_root), download=False))
    for name in built_in.IDX_FILES:
        content = built_in.read_file(built_in.find_file(folder, name), "mnist", name)
        save(tmp_path / "root", *FORMS[form](name, content))
    assert prepared(tmp_path / "root")[1] == MNIST_SHA256


def test_packed_files_are_read_even_if_unpacked_ones_are_there(tmp_path: Path) -> None:
    for name, content in TINY.items():
        save(tmp_path, name, gzip.compress(content))
        save(tmp_path, plain(name), OTHER[name])
    prepared(tmp_path)


@pytest.mark.parametrize("way", ["data.root", "MNIST_ROOT", "here"])
@pytest.mark.parametrize("level", [".", "MNIST", "MNIST/raw"])
@pytest.mark.parametrize("layout", ["MNIST/raw", "MNIST"])
def test_a_root_may_be_any_folder_from_the_files_up(
    layout: str, level: str, way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if len(level) > len(layout):
        return
    for name, content in TINY.items():
        save(tmp_path / layout, name, gzip.compress(content))
    root: Path | None = tmp_path / level
    if way == "MNIST_ROOT":
        monkeypatch.setenv("MNIST_ROOT", str(root))
        root = None
    elif way == "here":
        monkeypatch.chdir(tmp_path / level)
        root = Path()
    prepared(root)


def test_the_folder_of_one_data_set_is_not_that_of_another(tmp_path: Path) -> None:
    for name, content in TINY.items():
        save(tmp_path / "MNIST" / "raw", name, gzip.compress(content))
    for name in ("kmnist", "fashion_mnist"):
        with pytest.raises(built_in.DataMissing):
            prepared(tmp_path / "MNIST", name)


@pytest.mark.parametrize("name", IDX_NAMES)
@pytest.mark.parametrize("form", FORMS)
def test_other_data_under_the_names_of_a_data_set_are_refused(form: str, name: str, tmp_path: Path) -> None:
    for file, content in OTHER.items():
        save(tmp_path / "root", *FORMS[form](file, content))
    message = refusal(tmp_path / "root", name)
    assert message.startswith(f"{built_in.find_file(tmp_path / 'root', built_in.IDX_FILES[0])} ")
    expected = ["holds other data"] if name == "mnist" else ["cannot be verified", "published"]
    words = [*expected, f"{built_in.IDX_FILES[0]} of {name}", "`python -m launch data --from DIR`", "docs/your-own.md"]
    assert [word for word in words if word not in message] == []


@pytest.mark.parametrize("name", ["fashion_mnist", "kmnist"])
@pytest.mark.parametrize("form", FORMS)
def test_mnist_under_another_name_is_named(form: str, name: str, tmp_path: Path) -> None:
    for file, content in TINY.items():
        save(tmp_path / "root", *FORMS[form](file, content))
    assert f" holds {built_in.IDX_FILES[0]} of mnist, expected" in refusal(tmp_path / "root", name)


def test_a_file_of_mnist_in_place_of_another_is_named(tmp_path: Path) -> None:
    for file in built_in.IDX_FILES:
        save(tmp_path, file, TINY[file.replace("t10k", "train")])
    message = refusal(tmp_path)
    assert "t10k-images-idx3-ubyte.gz holds train-images-idx3-ubyte.gz of mnist, expected t10k-images" in message


def test_doctor_and_launch_data_say_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["data", "--root", str(tmp_path), "--no-download"]
    config = parse(["--data.root", str(tmp_path)])
    for files in ({}, {**TINY, built_in.IDX_FILES[2]: b"<html>"}, OTHER, TINY):
        for name, content in files.items():
            save(tmp_path, name, content)
        code, (finding,) = launch(arguments), checks.data(config)
        output = capsys.readouterr()
        assert (code, finding.status) == ((0, "OK") if files is TINY else (2, "fail"))
        said = finding.text.split(",")[0] if files is TINY else finding.text
        assert (output.out if files is TINY else output.err).removeprefix("error: ").startswith(said)


@pytest.fixture
def server() -> Iterator[str]:
    """Yield the address of a server that has no files and, as a proxy, wants a password."""

    class Refuse(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(404 if self.path.startswith("/") else 407)

        def do_CONNECT(self) -> None:
            self.send_error(407)

        def log_message(self, *arguments: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refuse) as found:
        threading.Thread(target=found.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{found.server_port}"
        found.shutdown()


def failed_download(root: Path, name: str) -> str:
    """Return the cause that ends the message of a failed download."""
    urllib.request.install_opener(None)  # type: ignore[arg-type]  # it would keep the proxies of the first download
    with pytest.raises(built_in.DataMissing) as error:
        data.prepare(DataConfig(name=name, root=str(root)))
    message = str(error.value)
    assert "\n" not in message
    assert "urlopen" not in message
    assert "Set MNIST_ROOT or --data.root" in message
    return message.partition(" The download's error: ")[2]


@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")  # of torchvision, which drops urllib's answers
@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "kmnist", "cifar10"])
def test_a_failed_download_ends_with_its_cause(
    name: str, server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{closed.getsockname()[1]}"
        for proxy, words in ((nobody, ("Connection refused",)), (server, ("407", "Proxy Authentication Required"))):
            for variable in ("http_proxy", "https_proxy"):
                monkeypatch.setenv(variable, proxy)
            cause = failed_download(tmp_path, name)
            assert [word for word in words if word not in cause] == []
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    dataset = getattr(torchvision.datasets, built_in.PUBLISHED[name].dataset)
    monkeypatch.setattr(dataset, *(("url", f"{server}/x") if name == "cifar10" else ("mirrors", [f"{server}/"] * 2)))
    assert failed_download(tmp_path, name) == "HTTP Error 404: Not Found"
    gc.collect()


CAUSES = {
    "Name or service not known": URLError(socket.gaierror(-2, "Name or service not known")),
    "[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: self-signed certificate in certificate chain "
    "(_ssl.c:1006)": URLError(
        ssl.SSLCertVerificationError(
            1,
            "[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: self-signed certificate in certificate chain "
            "(_ssl.c:1006)",
        )
    ),
    "timed out": TimeoutError("timed out"),
    "Remote end closed connection without response": RemoteDisconnected(
        "Remote end closed connection without response"
    ),
}


@pytest.mark.parametrize("cause", CAUSES)
@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_the_cause_of_a_failed_download_is_whole(
    name: str, cause: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any, **named: Any) -> None:
        raise CAUSES[cause]

    monkeypatch.setattr(urllib.request, "urlopen", fail)
    assert failed_download(tmp_path, name) == cause


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_cache_on_a_file_system_without_locks_costs_a_warning(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*arguments: Any) -> None:
        raise OSError(number, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    for _ in range(2):  # the second time from the cache
        data.prepare(DataConfig(name="digits"))
    lock = tmp_path / "cache" / "lockstep" / "digits.lock"
    assert capsys.readouterr().err.splitlines() == [
        f"warning: {lock} cannot be locked: No locks available. Each process may prepare the data."
    ]
    assert len(list(lock.parent.glob("digits-*.safetensors"))) == 1
