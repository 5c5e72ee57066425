"""JSON files in the user's cache folder, which many processes read and write.

Folder: $TRITON_LSTM_CACHE, else $XDG_CACHE_HOME/triton_lstm, else ~/.cache/triton_lstm. A file is replaced as a whole,
so a reader sees the one before or the one after. What cannot be read or written gives a warning and no exception.
"""
import contextlib
import json
import os
import pathlib
import tempfile
import warnings

try:
    import fcntl
except ImportError:         # not on Windows: there of two processes that write at the same time one may lose its part
    fcntl = None


def folder():
    """The path of the cache folder, which may not exist yet."""
    if own := os.environ.get("TRITON_LSTM_CACHE"):
        return pathlib.Path(own)
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "triton_lstm"


def read(name, check):
    """What the file ``name`` holds; {} if there is none or, with a warning, if it is broken: if it is not JSON, or
    ``check`` of its content raises."""
    path = folder() / name
    try:
        found = json.loads(path.read_text())
        check(found)
        return found
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        warnings.warn(f"triton_lstm ignores {path}: {error}", stacklevel=3)
        return {}


def update(name, check, change):
    """Replace the file ``name`` by ``change`` of what it holds. No other process writes in between."""
    try:
        folder().mkdir(parents=True, exist_ok=True)
        with locked(None):
            found = change(read(name, check))
            with tempfile.NamedTemporaryFile("w", dir=folder(), suffix=".json", delete=False) as file:
                try:
                    json.dump(found, file, indent=1)
                    file.close()
                    os.replace(file.name, folder() / name)
                except BaseException:
                    os.unlink(file.name)
                    raise
    except OSError as error:
        warnings.warn(f"triton_lstm cannot write {folder() / name}: {error}", stacklevel=3)


@contextlib.contextmanager
def locked(name):
    """Hold a lock that only one process has at a time, and that ends with its process: of the file ``name`` in the
    cache folder, or of the folder itself if None. Where the system has no such locks, there is none."""
    opened = None
    try:
        folder().mkdir(parents=True, exist_ok=True)
        opened = os.open(folder() if name is None else folder() / name, os.O_RDONLY | (os.O_CREAT if name else 0))
        if fcntl is not None:
            fcntl.flock(opened, fcntl.LOCK_EX)
    except OSError:         # as on some network file systems
        pass
    try:
        yield
    finally:
        if opened is not None:
            os.close(opened)
