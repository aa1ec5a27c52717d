"""Execute a notebook headless: a thin, strict layer on papermill.

papermill merely warns about a parameter that the notebook lacks, accepts any type and sets no time limit. Here, bad
parameters are refused before a kernel starts, every cell has a time limit, and the executed copy gets its name only
once the last cell has succeeded, so that Make can trust it.
"""

import ast
import os
import re
import reprlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nbformat
import papermill
import yaml
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_core.paths import jupyter_runtime_dir
from nbclient.exceptions import CellTimeoutError, DeadKernelError
from papermill.exceptions import PapermillExecutionError

from nodules import course, paths
from nodules.errors import InputError, NotebookFailed, in_brief, within

KERNEL = "python3"
# glibc keeps up to 1 GB of what tensors of up to 64 MB leave, instead of faulting it in again at every step
MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(1 << 26), "MALLOC_TRIM_THRESHOLD_": str(1 << 30)}
PACKAGE = Path(__file__).parents[1]
ERROR_LINES = 12
LARGEST_PROFILE = 100_000  # bytes
TIME_LIMIT, SECONDS = "cell_timeout_s", 3600  # for one cell; a profile may set it, though it is no notebook's parameter


def _yaml(text: str) -> Any:
    """The value that a YAML text stands for.

    Raises:
        ValueError: the text is not valid YAML, or asks for more than plain values.
    """
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(in_brief(error)) from error


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file that holds a mapping.

    Raises:
        InputError: unreadable, too large, or not a mapping.
    """
    try:
        if path.stat().st_size > LARGEST_PROFILE:
            raise ValueError(f"more than {LARGEST_PROFILE} bytes")
        content = _yaml(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: can't be read as YAML ({in_brief(error)}); compare params/demo.yaml") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: not a mapping of parameters; write lines such as seed: 0")
    return content


def read_profile(path: Path) -> dict[str, Any]:
    """Read a profile, a YAML mapping; checked by :func:`checked`."""
    return checked(path, read_yaml(path))


def checked(path: Path, profile: dict[str, Any]) -> dict[str, Any]:
    """A profile from ``path`` whose keys are ``TIME_LIMIT`` and parameters, each of at least one notebook, as typed.

    Raises:
        InputError: a key that no notebook has as a parameter, or a value of another type.
    """
    notebooks = [course.parameters(notebook) for notebook in sorted(paths.NOTEBOOKS.glob("*.ipynb"))]
    typed = {}
    for key, value in profile.items():
        defaults = [SECONDS] if key == TIME_LIMIT else [known[key] for known in notebooks if key in known]
        if not defaults:
            name = reprlib.repr(key)
            raise InputError(f"{path}: no notebook has a parameter {name}; correct or remove it")
        for default in defaults:
            typed[key] = course.typed(key, value, default)
    return typed


def time_limit(profile: dict[str, Any], given: int | None) -> int:
    """The seconds a cell may take: those given, else the profile's, else an hour."""
    limit = profile.get(TIME_LIMIT, SECONDS) if given is None else given
    within(1, 10_000_000, **{TIME_LIMIT: limit})
    return limit


def merge(notebook: Path, profile: dict[str, Any], assignments: list[str]) -> dict[str, Any]:
    """A notebook's parameters: those of a profile, overridden by ``key=value`` texts.

    A value for a text parameter is taken literally, so that a folder may be called ``2024-01-05`` or ``on``; other
    values are parsed as YAML.
    """
    defaults = course.parameters(notebook)
    chosen = {key: value for key, value in profile.items() if key in defaults}
    for assignment in assignments:
        key, equals, value = assignment.partition("=")
        shown = reprlib.repr(assignment)
        if not equals or key not in defaults:
            known = ", ".join(defaults)
            raise InputError(f"-p {shown}: {notebook.name} has no such parameter; use one of {known}")
        try:
            chosen[key] = value if type(defaults[key]) is str else _yaml(value)
        except ValueError as error:
            raise InputError(f"-p {shown}: the value is not valid YAML; put it in quotes") from error
    return {key: course.typed(key, value, defaults[key]) for key, value in chosen.items()}


def modules(notebook: Path) -> list[Path]:
    """The files of this package whose code a notebook runs: what it imports, and what that imports in turn."""
    waiting = ["\n".join(cell["source"] for cell in course.code_cells(notebook))]
    used: set[Path] = set()
    while waiting:
        files = {file for name in _imported(waiting.pop()) for file in _files(name)} - used
        used |= files
        waiting += [file.read_text(encoding="utf-8") for file in files]
    return sorted(used)


def _imported(source: str) -> Iterator[str]:
    """The dotted names that a source imports, whether they are modules or functions; none is relative."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _files(name: str) -> Iterator[Path]:
    """The files of this package that run when a dotted name is imported, except those with only a docstring."""
    package, *parts = name.split(".")
    if package != PACKAGE.name:
        return
    for count in range(len(parts) + 1):
        place = PACKAGE.joinpath(*parts[:count])
        for file in (place / "__init__.py", place.with_suffix(".py")):
            if file.is_file():
                body = ast.parse(file.read_text(encoding="utf-8")).body
                yield from [file] if any(not isinstance(statement, ast.Expr) for statement in body) else []


def execute(notebook: Path, output: Path, chosen: dict[str, Any], cell_timeout_s: int) -> None:
    """Run ``notebook`` with parameters ``chosen`` and write the executed copy to ``output``.

    ``<name>.d`` beside it tells Make which modules the copy depends on. If a cell fails, the copy is kept as
    ``<name>.failed.ipynb`` instead.

    Raises:
        InputError: a cell raised it.
        NotebookFailed: a cell or the kernel failed in any other way.
    """
    _check_home()
    _check_kernel()
    # torch warns about its own calls, which would put a notice at the top of every notebook
    os.environ["PYTHONWARNINGS"] = "ignore::FutureWarning:torch.jit._script"
    os.environ |= MALLOC
    with paths.replacing(output) as partial:
        try:
            papermill.execute_notebook(
                *(str(path).replace("{", "{{").replace("}", "}}") for path in (notebook, partial)),
                parameters=chosen,
                kernel_name=KERNEL,
                language="python",
                cwd=notebook.parent,
                progress_bar=False,
                execution_timeout=cell_timeout_s,
                on_cell_executed=_step_printer(notebook),
                stderr_file=sys.stderr,
                extra_arguments=["--log-level=CRITICAL"],
            )
        except (PapermillExecutionError, DeadKernelError, CellTimeoutError) as error:
            failed = output.with_name(f"{output.stem}.failed.ipynb")
            partial.replace(failed)
            raise _failure(notebook, failed, error) from error
        _write_dependencies(notebook, output, (course.parameters(notebook) | chosen).get("data"))
    output.with_name(f"{output.stem}.failed.ipynb").unlink(missing_ok=True)


def _failure(notebook: Path, failed: Path, error: Exception) -> InputError | NotebookFailed:
    """The exception to raise for a failed cell: its own InputError, else one with its code and the end of its error."""
    if getattr(error, "ename", None) == InputError.__name__:
        return InputError(error.evalue)
    if isinstance(error, DeadKernelError):
        return NotebookFailed(f"{notebook.name}: its kernel died, killed or out of memory; see {failed}")
    lines = [line for line in str(error).splitlines() if line.strip()][-ERROR_LINES:]
    where = ["cell:", error.source] if isinstance(error, PapermillExecutionError) else []
    return NotebookFailed("\n".join([f"{notebook.name}: a cell failed; see {failed}", *where, *lines]))


def _write_dependencies(notebook: Path, output: Path, data: str | None) -> None:
    """Tell Make, in ``<name>.d`` beside an executed notebook, which modules it depends on and which data it read.

    Make's DRAWING is left out: code that only draws figures again, from the data kept with them. A run's folder is
    named after the last part of the path of its data; other data whose path ends alike make the notebook stale.
    """
    used = [_shown(path) for path in modules(notebook)]
    # An empty rule for each module, as compilers write them, so that a removed module does not stop Make
    lines = [f"{_shown(output)}: $(filter-out $(DRAWING),{' '.join(used)})", *(f"{path}:" for path in used)]
    if data is not None:
        # Make's DATA never contains any of SIGNS, so that a name with one differs from it, as it should
        plain = re.sub(r"[\s\"'`\\;:|&<>()\[\]*?%=$#]", "?", data)
        lines += [f'ifneq "$(DATA)" "{plain}"', f"{_shown(output)}: other-data", "endif"]
    paths.write(output.with_suffix(".d"), "\n".join(lines) + "\n")


def _check_kernel() -> None:
    """Refuse a ``python3`` kernel that a user has installed: it would run in place of this environment's.

    Paths may differ: what counts is the environment that an interpreter belongs to.
    """
    interpreter = KernelSpecManager().get_kernel_spec(KERNEL).argv[0]
    if interpreter in ("python", "python3", f"python3.{sys.version_info.minor}"):
        return  # jupyter_client replaces these names by its own interpreter
    command = [interpreter, "-c", "import sys; print(sys.prefix)"]
    try:
        prefix = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        prefix = "no interpreter"
    if os.path.realpath(prefix) != os.path.realpath(sys.prefix):
        raise InputError(f"kernel {KERNEL!r}: runs {interpreter}, not {sys.executable}; remove that kernelspec")


def _check_home() -> None:
    """Refuse a home folder that can't be written to: Jupyter keeps the addresses of its kernels below it."""
    runtime = Path(jupyter_runtime_dir())
    nearest = next(folder for folder in (runtime, *runtime.absolute().parents) if folder.exists())
    if not (nearest.is_dir() and os.access(nearest, os.W_OK)):
        raise InputError(f"{runtime}: can't be written to, but kernels need it; set another home, as in HOME=$PWD/home")


def _step_printer(notebook: Path) -> Callable[..., None]:
    """A hook that prints a line after each code cell: its number, the seconds so far, the heading above it."""
    title, started, done = notebook.stem, time.monotonic(), 0
    cells = nbformat.read(notebook, as_version=4).cells
    total = sum(cell.cell_type == "code" for cell in cells) + 1  # papermill injects one
    headings, heading = {}, title
    for cell in cells:
        if cell.cell_type == "markdown":
            heading = next((line.lstrip("# ") for line in cell.source.splitlines()[::-1] if line[:1] == "#"), heading)
        headings[cell.id] = heading

    def hook(cell: nbformat.NotebookNode, **_: Any) -> None:
        nonlocal done
        done += 1
        elapsed = time.monotonic() - started
        line = f"{title} {done:>3}/{total} {elapsed:7.1f} s  {headings.get(cell.id, 'parameters')}\n"
        print(line, end="", flush=True)  # in one write, also unbuffered: other notebooks write to the same pipe

    return hook


def _shown(path: Path) -> str:
    """A path as the Makefile writes it: relative to the root if it lies below, symbolic links left as they are."""
    path = path.absolute()
    return str(path.relative_to(paths.ROOT) if path.is_relative_to(paths.ROOT) else path)
