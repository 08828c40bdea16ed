"""Which versions of packages are installed."""

from importlib.metadata import PackageNotFoundError, version


def versions(*packages: str) -> dict[str, str]:
    """Return {package: version}. Leave out packages without metadata, such as a source tree on PYTHONPATH."""
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
