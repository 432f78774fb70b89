"""Create .venv and install the project into it. Standard library only; run by the Makefile with any python3.

Usage: python3 tools/install.py

TORCH=cpu or TORCH=cuda in the environment chooses torch's build; left out, a Linux machine with an NVIDIA GPU gets the
CUDA build and every other machine the CPU build. A finished .venv is recognised by a stamp, and nothing is done.
"""

import contextlib
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import threading
import time

OLDEST = (3, 11)
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
VENV = os.path.join(ROOT, ".venv")
STAMP = os.path.join(VENV, "ready.json")  # written last: without it, a .venv is half made
CPU_INDEX = "https://download.pytorch.org/whl/cpu"  # PyTorch's own index; PyPI has no CPU builds for Linux
GIGABYTES = {"cpu": 4, "cuda": 12}  # room that downloading and unpacking need
PIP = ["install", "--no-input", "--disable-pip-version-check", "--retries", "2"]
MOVERS = ("PYTHONHOME", "PYTHONPATH", "PIP_PYTHON", "PIP_DRY_RUN", "PIP_NO_DEPS")  # no option of pip overrules these
IMPORTS = ("torch", "jupyterlab", "nbgrader", "nbval", "pytest", "minilib")


class SetupError(Exception):
    """Set-up cannot go on; the message is one sentence for the person at the terminal."""


def main():
    """Install if needed; return the exit code."""
    try:
        _use_new_enough_python()
        with _alone():
            install()
    except SetupError as error:
        sys.stderr.write("set-up failed: {}\n".format(error))
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("\nset-up interrupted; run the same command again to start over\n")
        return 130
    return 0


def install():
    """Bring .venv to what pyproject.toml and constraints.txt ask for; do nothing if it is there."""
    build, why = choose_torch(os.environ.get("TORCH", "auto"))
    wanted = fingerprint(build)
    found = _read_stamp()
    if found == wanted:
        return
    if os.path.isdir(VENV) and not os.path.isfile(os.path.join(VENV, "pyvenv.cfg")) and os.listdir(VENV):
        raise SetupError("{} exists and is not a virtual environment; move it away".format(VENV))
    _check_room(GIGABYTES[build])
    started = time.time()
    same_place = found is not None and all(found[key] == wanted[key] for key in ("root", "python"))
    if found is not None:
        os.remove(STAMP)  # from here on it is half made, whatever happens
    if same_place:
        print("[1/4] .venv is there, but what the project needs has changed: updating it")
    else:
        print("[1/4] creating .venv with Python {}".format(platform.python_version()))
        shutil.rmtree(VENV, ignore_errors=True)
        _run([sys.executable, "-m", "venv", VENV])
    print("[2/4] installing torch, {} build: {}".format(build, why))
    install_torch(build)
    print("[3/4] installing everything else")
    _pip("-c", "constraints.txt", "-e", ".[observe,serve,test]")
    print("[4/4] finishing")
    check_imports(IMPORTS)
    _configure_lab()
    with open(STAMP, "w") as file:
        json.dump(wanted, file)
    print("set up in {:.0f} s".format(time.time() - started))


def install_torch(build):
    """Install the pinned torch. A CPU build that is within reach of pip as it is set up comes first, then PyTorch's."""
    pin = pinned("torch")
    if build == "cuda" or sys.platform != "linux":
        return _pip("-c", "constraints.txt", "torch")
    cpu = ["-c", "constraints.txt", "torch=={}+cpu".format(pin)]
    python = "Python {}.{}".format(*sys.version_info[:2])
    way_out = (
        "try another one with `make lab PYTHON=python3.12`, or take the CUDA build with `TORCH=cuda make lab`: "
        "it runs without a GPU as well, for {} GB of disk instead of {}".format(GIGABYTES["cuda"], GIGABYTES["cpu"])
    )
    try:
        return _pip(*cpu)
    except NotToBeHad:
        pass
    try:
        return _pip(*(cpu + ["--extra-index-url", CPU_INDEX]))
    except NotToBeHad:
        raise SetupError("there is no CPU build of torch {} for {}; {}".format(pin, python, way_out)) from None
    except Unreachable as error:
        raise SetupError(
            "{}; PyTorch's own index {} is the one that may have a CPU build of torch {} for {}; if it stays out of "
            "reach, {}".format(error, CPU_INDEX, pin, python, way_out)
        ) from None


def check_imports(modules):
    """Import what was installed with the Python of .venv, and with nothing else in its sight.

    Raises:
        SetupError: if a module cannot be imported: pip had put it elsewhere, or left it out, and was content.
    """
    for module in modules:
        tried = subprocess.run(
            [_python(), "-I", "-c", "import " + module],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, universal_newlines=True,
        )  # fmt: skip
        if tried.returncode != 0:
            said = (tried.stdout.strip().splitlines() or ["no output at all"])[-1]
            raise SetupError(
                "pip was content, but .venv cannot import {} ({}); look for a setting of yours that keeps packages out "
                "of it: `{} -m pip config list`".format(module, said, _python())
            )


def choose_torch(asked):
    """("cpu" or "cuda", why), from what was asked for and what is in this machine."""
    if asked in ("cpu", "cuda"):
        return asked, "you asked for it with TORCH={}".format(asked)
    if asked != "auto":
        raise SetupError("TORCH is cpu, cuda or auto, not {!r}".format(asked))
    if sys.platform == "linux" and has_nvidia_gpu():
        return "cuda", "there is an NVIDIA GPU"
    return "cpu", "there is no NVIDIA GPU"


def has_nvidia_gpu():
    """True if the NVIDIA driver lists at least one GPU."""
    gpus = "/proc/driver/nvidia/gpus"
    if os.path.isdir(gpus) and os.listdir(gpus):
        return True
    if shutil.which("nvidia-smi") is None:
        return False
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return listed.returncode == 0 and b"GPU" in listed.stdout


def fingerprint(build):
    """What a finished .venv must have been made from."""
    digest = hashlib.sha256()
    for name in ("pyproject.toml", "constraints.txt"):
        with open(os.path.join(ROOT, name), "rb") as file:
            digest.update(file.read())
    return {"needs": digest.hexdigest(), "torch": build, "root": ROOT, "python": platform.python_version()}


def pinned(package):
    """The version of a package that constraints.txt pins."""
    with open(os.path.join(ROOT, "constraints.txt")) as file:
        return re.search(r"^{}==(\S+)".format(package), file.read(), re.M).group(1)


class NotToBeHad(SetupError):
    """pip could reach its indexes, and they have no such build."""


class Unreachable(SetupError):
    """pip could not reach an index."""


def explain(output):
    """The one sentence behind a failed pip or venv, as the exception to raise."""
    if re.search(r"No space left on device|Errno 28", output):
        return SetupError("the disk is full; make room for a few GB and run this again")
    if re.search(r"ensurepip is not|No module named '?(venv|ensurepip)", output):
        return SetupError("this Python has no venv; on Debian or Ubuntu: apt install python3-venv")
    if re.search(r"Permission denied|Errno 13|Read-only file system|Errno 30", output):
        return SetupError("this folder cannot be written to; copy the project to one that can")
    unreachable = "NewConnectionError|NameResolutionError|Failed to resolve|name resolution|ConnectTimeout|Max retries"
    if re.search(unreachable + "|ReadTimeout|ProxyError|SSLError|Network is unreachable", output):
        return Unreachable("the package index could not be reached; check the network (or proxy) and run this again")
    missing = re.search(r"No matching distribution found for (\S+)", output)
    if missing:
        return NotToBeHad("the package index has no {} for this Python and platform".format(missing.group(1)))
    conflict = re.search(r"Cannot install (.+) because", output)
    if conflict and "ResolutionImpossible" in output:  # pip's words also for one version that no index has
        return NotToBeHad("the package index has no versions that fit together for {}".format(conflict.group(1)))
    last = [line for line in output.strip().splitlines() if line.strip()][-1:] or ["no output at all"]
    return SetupError("pip stopped with: {}".format(last[0].strip()))


def _pip(*args):
    """Run pip, whatever the user's settings say about where packages go; index, proxy and certificates are theirs."""
    stay = ["--no-user", "--target=", "--root=" + os.sep, "--prefix=" + VENV]
    _run([_python(), "-m", "pip"] + PIP + stay + list(args))


def _python():
    return os.path.join(VENV, "Scripts" if os.name == "nt" else "bin", "python")


def _run(command):
    """Run a command with one live line of progress; raise what `explain` makes of its output if it fails."""
    env = {name: value for name, value in os.environ.items() if name not in MOVERS}
    process = subprocess.Popen(
        command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, universal_newlines=True
    )
    lines = []
    try:
        with _Progress() as progress:
            for line in process.stdout:
                lines.append(line)
                progress.say(line)
            code = process.wait()
    except BaseException:
        process.kill()
        process.wait()
        raise
    if code != 0:
        raise explain("".join(lines))


class _Progress(object):
    """Shows what pip is at, and for how long: one changing line on a terminal, elsewhere a line every ten seconds."""

    def __init__(self):
        self._text, self._started = "starting", time.time()
        self._done = threading.Event()
        self._live = sys.stdout.isatty()

    def say(self, line):
        found = re.match(r"\s*(Collecting|Downloading|Installing|Preparing|Building|Successfully) *(.*)", line)
        if found:
            self._text = " ".join(found.groups())[:70]

    def __enter__(self):
        self._thread = threading.Thread(target=self._show)
        self._thread.daemon = True
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._done.set()
        self._thread.join()
        if self._live:
            sys.stdout.write("\r\033[K")
            sys.stdout.flush()

    def _show(self):
        while not self._done.wait(0.2 if self._live else 10):
            line = "      {:3.0f} s  {}".format(time.time() - self._started, self._text)
            sys.stdout.write("\r\033[K" + line if self._live else line + "\n")
            sys.stdout.flush()


def _use_new_enough_python():
    """Go on with a newer Python if this one is too old and there is one."""
    if sys.version_info[:2] >= OLDEST:
        return
    for minor in (13, 12, 11):
        newer = shutil.which("python3.{}".format(minor))
        if newer and subprocess.call([newer, "-c", "import venv, ensurepip"], stderr=subprocess.DEVNULL) == 0:
            print("python3 is {}; using {} instead".format(platform.python_version(), newer))
            sys.stdout.flush()
            sys.exit(subprocess.call([newer, os.path.abspath(__file__)]))
    raise SetupError(
        "Python {}.{} or newer is needed, this is {}; name another one with `make lab PYTHON=python3.12`".format(
            OLDEST[0], OLDEST[1], platform.python_version()
        )
    )


@contextlib.contextmanager
def _alone():
    """Let one set-up at a time work on .venv; the second one waits, and says so."""
    try:
        import fcntl
    except ImportError:  # Windows: whoever runs two set-ups at once there is on their own
        yield
        return
    try:
        lock = open(os.path.join(ROOT, ".install.lock"), "w")  # noqa: SIM115 - held until the process ends
    except OSError as error:
        raise explain(str(error)) from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        print("another set-up is at work on .venv; waiting for it")
        fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        yield
    finally:
        lock.close()


def _read_stamp():
    """What .venv was made from, or None if it is not there or half made."""
    try:
        with open(STAMP) as file:
            return json.load(file)
    except (OSError, ValueError):
        return None


def _check_room(gigabytes):
    free = shutil.disk_usage(ROOT).free / 1e9
    if free < gigabytes:
        raise SetupError("{} GB of disk are needed here, {:.1f} GB are free".format(gigabytes, free))


def _configure_lab():
    """JupyterLab asks every new reader whether it may fetch news; answer no."""
    folder = os.path.join(VENV, "share", "jupyter", "lab", "settings")
    os.makedirs(folder, exist_ok=True)
    quiet = {"@jupyterlab/apputils-extension:notification": {"fetchNews": "false", "checkForUpdates": False}}
    with open(os.path.join(folder, "overrides.json"), "w") as file:
        json.dump(quiet, file)


if __name__ == "__main__":
    sys.exit(main())
