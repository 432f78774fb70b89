"""Set-up: what it decides, what it never takes for done, and the one sentence in which it fails."""

import compileall
import ensurepip
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import jsonschema
import pytest

from tools import install

SCRIPT = Path(install.__file__)


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project of its own in a temporary folder, where commands are recorded instead of run."""
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(SCRIPT.parents[1] / name, tmp_path / name)
    commands = []

    def run(command):
        commands.append(command)
        if "venv" in command:
            Path(install.VENV).mkdir()
            Path(install.VENV, "pyvenv.cfg").touch()

    monkeypatch.setattr(install, "ROOT", str(tmp_path))
    monkeypatch.setattr(install, "VENV", str(tmp_path / ".venv"))
    monkeypatch.setattr(install, "STAMP", str(tmp_path / ".venv" / "ready.json"))
    monkeypatch.setattr(install, "_run", run)
    monkeypatch.setattr(install, "check_imports", lambda modules: None)
    monkeypatch.setattr(install, "_check_room", lambda gigabytes: None)
    monkeypatch.delenv("TORCH", raising=False)
    monkeypatch.setattr(install, "has_nvidia_gpu", lambda: False)
    return commands


def kinds(commands):
    return ["venv" if "venv" in command else "pip" for command in commands]


def test_first_call_installs_and_the_second_does_nothing(project):
    install.install()
    assert kinds(project) == ["venv", "pip", "pip"]
    install.install()
    assert len(project) == 3


def test_the_stamp_is_the_last_thing_written(project, monkeypatch):
    def fail(command):
        raise install.SetupError("no network")

    monkeypatch.setattr(install, "_pip", lambda *args: fail(args))
    with pytest.raises(install.SetupError):
        install.install()
    assert Path(install.VENV).is_dir() and not Path(install.STAMP).exists()


def test_a_half_made_venv_is_made_anew(project):
    Path(install.VENV).mkdir()
    Path(install.VENV, "pyvenv.cfg").touch()
    leftover = Path(install.VENV, "leftover")
    leftover.touch()
    install.install()
    assert kinds(project)[0] == "venv" and not leftover.exists()


@pytest.mark.parametrize("content", ["", "{", "null"])
def test_a_damaged_stamp_counts_as_none(project, content):
    install.install()
    Path(install.STAMP).write_text(content)
    install.install()
    assert kinds(project) == ["venv", "pip", "pip"] * 2


def test_changed_needs_update_in_place_and_a_moved_project_starts_over(project):
    install.install()
    constraints = Path(install.ROOT, "constraints.txt")
    constraints.write_text(constraints.read_text() + "# changed\n")
    install.install()
    assert kinds(project)[3:] == ["pip", "pip"]
    stamp = json.loads(Path(install.STAMP).read_text())
    Path(install.STAMP).write_text(json.dumps({**stamp, "root": "/elsewhere"}))
    install.install()
    assert kinds(project)[5:] == ["venv", "pip", "pip"]


def test_an_update_that_fails_leaves_no_stamp(project, monkeypatch):
    install.install()
    monkeypatch.setenv("TORCH", "cuda")

    def fail(command):
        raise install.explain("OSError: [Errno 28] No space left on device")

    monkeypatch.setattr(install, "_run", fail)
    with pytest.raises(install.SetupError, match="disk is full"):
        install.install()
    assert not Path(install.STAMP).exists()


def test_a_folder_that_is_no_venv_is_not_deleted(project):
    Path(install.VENV).mkdir()
    precious = Path(install.VENV, "precious")
    precious.touch()
    with pytest.raises(install.SetupError, match="is not a virtual environment"):
        install.install()
    assert precious.exists()


@pytest.mark.parametrize(
    ("asked", "gpu", "expected"),
    [("auto", False, "cpu"), ("auto", True, "cuda"), ("cpu", True, "cpu"), ("cuda", False, "cuda")],
)
def test_torch_follows_the_machine_unless_told(asked, gpu, expected, monkeypatch):
    monkeypatch.setattr(install, "has_nvidia_gpu", lambda: gpu)
    monkeypatch.setattr(sys, "platform", "linux")
    build, why = install.choose_torch(asked)
    assert build == expected and why


def test_an_unknown_build_is_refused():
    with pytest.raises(install.SetupError, match="TORCH is cpu, cuda or auto, not 'gpu'"):
        install.choose_torch("gpu")


def test_the_cpu_build_is_sought_nearby_first_then_at_pytorch(project, monkeypatch):
    tried = []

    def pip(*args):
        tried.append(args)
        raise install.explain("ERROR: No matching distribution found for torch==2.13.0+cpu")

    monkeypatch.setattr(install, "_pip", pip)
    monkeypatch.setattr(sys, "platform", "linux")
    with pytest.raises(install.SetupError, match="TORCH=cuda make lab"):
        install.install_torch("cpu")
    assert [install.CPU_INDEX in args for args in tried] == [False, True]
    assert all(args[2].endswith("+cpu") for args in tried)  # never gigabytes of CUDA by accident


NO_SUCH_BUILD = """ERROR: Cannot install torch==2.13.0+cpu because these package versions have conflicting dependencies.
    The user requested torch==2.13.0+cpu
    The user requested (constraint) torch==2.13.0
ERROR: ResolutionImpossible: for help visit https://pip.example"""


@pytest.mark.parametrize(
    ("second", "sentence"),
    [
        (NO_SUCH_BUILD, "there is no CPU build of torch 2.13.0 for Python 3."),
        (f"WARNING: Retrying ... NewConnectionError ...\n{NO_SUCH_BUILD}", "could not be reached"),
    ],
)
def test_a_missing_cpu_build_is_named_with_its_python_and_the_price_of_the_other(
    second, sentence, project, monkeypatch
):
    """pip says ResolutionImpossible of a version that no index has, if constraints.txt names it, too."""
    said = [NO_SUCH_BUILD, second]

    def run(command):
        raise install.explain(said.pop(0))

    monkeypatch.setattr(install, "_run", run)
    monkeypatch.setattr(sys, "platform", "linux")
    with pytest.raises(install.SetupError, match=sentence) as caught:
        install.install_torch("cpu")
    assert not said  # PyTorch's own index was asked, too
    for words in ("torch 2.13.0 for Python 3.", "TORCH=cuda make lab", "12 GB of disk instead of 4"):
        assert words in str(caught.value)


def test_no_network_is_not_taken_for_no_build(project, monkeypatch):
    def pip(*args):
        raise install.explain(
            "WARNING: Retrying ... NewConnectionError ...\nERROR: No matching distribution found for torch"
        )

    monkeypatch.setattr(install, "_pip", pip)
    monkeypatch.setattr(sys, "platform", "linux")
    with pytest.raises(install.SetupError, match="package index could not be reached"):
        install.install_torch("cpu")


@pytest.mark.parametrize(
    ("output", "sentence"),
    [
        ("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device", "disk is full"),
        ("The virtual environment was not created successfully because ensurepip is not\navailable.", "no venv"),
        ("/usr/bin/python3: No module named venv", "no venv"),
        ("OSError: [Errno 30] Read-only file system: '.venv'", "cannot be written"),
        ("NameResolutionError: Failed to resolve 'index.example'", "could not be reached"),
        ("ERROR: No matching distribution found for triton==3.7.1", "no triton==3.7.1"),
        (
            "ERROR: Cannot install a==1, b==2 because\nERROR: ResolutionImpossible",
            "no versions that fit together for a==1",
        ),
        ("ERROR: something else entirely", "pip stopped with: ERROR: something else entirely"),
        ("", "no output at all"),
    ],
)
def test_failures_are_one_sentence(output, sentence):
    error = install.explain(output)
    assert sentence in str(error) and "\n" not in str(error)


def test_too_little_disk_is_said_before_anything_is_downloaded(monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 10**9))
    with pytest.raises(install.SetupError, match="4 GB of disk are needed here, 1.0 GB are free"):
        install._check_room(4)


def test_the_pin_is_read_from_constraints():
    assert install.pinned("torch").count(".") == 2


def test_no_process_of_jupyter_parses_a_grammar_when_it_starts():
    assert jsonschema.validate(1, {"type": "integer"}) is None
    assert "rfc3987_syntax" not in sys.modules


def test_interrupting_ends_with_130_and_kills_pip(monkeypatch, capsys):
    def interrupt():
        raise KeyboardInterrupt

    monkeypatch.setattr(install, "install", interrupt)
    assert install.main() == 130
    assert "interrupted" in capsys.readouterr().err


def test_a_failing_command_is_explained_and_a_working_one_is_not(tmp_path):
    install._run([sys.executable, "-c", "print('Collecting nothing')"])
    with pytest.raises(install.SetupError, match="disk is full"):
        install._run([sys.executable, "-c", "print('[Errno 28] No space left on device'); raise SystemExit(1)"])


def test_an_old_python_gets_a_sentence(tmp_path):
    old = next((path for minor in range(10, 5, -1) if (path := old_python(minor))), None)
    if old is None:
        pytest.skip("no Python older than 3.11 on this machine")
    bare = {"PATH": str(tmp_path), "HOME": str(tmp_path)}  # with no newer Python in sight
    run = subprocess.run([old, str(SCRIPT)], env=bare, capture_output=True, text=True, timeout=30)
    assert run.returncode == 1
    assert run.stderr.startswith("set-up failed: Python 3.11 or newer is needed, this is 3.")
    assert "Traceback" not in run.stderr and run.stderr.count("\n") == 1


def old_python(minor: int) -> str | None:
    found = sorted(Path.home().glob(f".pyenv/versions/3.{minor}.*/bin/python3"))
    return str(found[0]) if found else shutil.which(f"python3.{minor}")


@pytest.fixture(scope="module")
def venv(tmp_path_factory):
    """A virtual environment with nothing but pip, unpacked from the wheel that Python has at hand."""
    folder = tmp_path_factory.mktemp("venv") / ".venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True, timeout=120)
    pip = next(Path(ensurepip.__file__).parent.glob("_bundled/pip-*.whl"))
    packages = next(folder.glob("lib/*/site-packages"))
    with zipfile.ZipFile(pip) as wheel:
        wheel.extractall(packages)
    compileall.compile_dir(packages, quiet=1)  # once; from the wheel itself, every run would compile pip anew
    return folder


@pytest.fixture
def package(tmp_path, venv, monkeypatch):
    """A tiny package that the installer can put into the virtual environment; gone again afterwards."""
    monkeypatch.setattr(install, "VENV", str(venv))
    wheel = tmp_path / "tiny-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr("tiny.py", "")
        file.writestr("tiny-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n")
        file.writestr("tiny-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr("tiny-1.0.dist-info/RECORD", "tiny.py,,\n")
    yield wheel
    for path in venv.glob("lib/*/site-packages/tiny*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.mark.parametrize(
    "settings",
    [
        {"PIP_USER": "1"},
        {"PIP_TARGET": "elsewhere"},
        {"PIP_PREFIX": "elsewhere"},
        {"PIP_ROOT": "elsewhere"},
        {"PIP_PYTHON": sys.executable, "PIP_DRY_RUN": "1"},
        {"PIP_CONFIG_FILE": "[install]\ntarget = elsewhere\n"},
        {"PYTHONPATH": "elsewhere", "PYTHONHOME": sys.base_prefix},
    ],
    ids=str,
)
def test_settings_that_move_packages_are_overruled(settings, package, tmp_path, monkeypatch):
    elsewhere = tmp_path / "elsewhere"
    for name, value in settings.items():
        if name == "PIP_CONFIG_FILE":
            config = tmp_path / "pip.conf"
            config.write_text(value.replace("elsewhere", str(elsewhere)))
            value = str(config)
        elif name == "PYTHONPATH":  # the package is in sight, so pip would be content without installing it
            zipfile.ZipFile(package).extractall(elsewhere)
        monkeypatch.setenv(name, str(elsewhere) if value == "elsewhere" else value)
    install._pip("--no-index", str(package))
    install.check_imports(["tiny"])
    assert next(Path(install.VENV).glob("lib/*/site-packages/tiny.py"))
    assert "PYTHONPATH" in settings or not elsewhere.exists()


def test_what_pip_left_out_is_noticed(venv, monkeypatch):
    monkeypatch.setattr(install, "VENV", str(venv))
    with pytest.raises(install.SetupError, match="cannot import tiny .ModuleNotFoundError: No module named 'tiny'"):
        install.check_imports(["tiny"])


def test_where_packages_come_from_is_the_users_to_say(package, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(package.parent))
    install._pip("tiny==1.0")
    install.check_imports(["tiny"])


def test_make_shields_the_environment_from_another_pythons_packages():
    environment = {**os.environ, "PYTHONPATH": "elsewhere", "PYTHONHOME": "elsewhere"}
    show = ["make", "--no-print-directory", "-f", "Makefile", "-f", "-", "show"]
    rule = "show:\n\t@echo $$PYTHONPATH,$$PYTHONHOME\n"
    for words, seen in ((show, ","), ([*show, "RUN=python3"], "elsewhere,elsewhere")):
        run = subprocess.run(words, input=rule, cwd=SCRIPT.parents[1], env=environment, capture_output=True, text=True)
        assert run.stdout.strip() == seen
