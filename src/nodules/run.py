"""Execute a notebook headless: a thin, strict layer on papermill.

papermill only warns of a parameter that a notebook does not have, takes any type, and has no time limit; here
all of that is refused before a kernel starts, and the executed copy appears under its name only when it ended
well, so that Make can trust it.
"""

import ast
import math
import os
import re
import reprlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import nbformat
import papermill
import yaml
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_core.paths import jupyter_runtime_dir
from nbclient.exceptions import CellTimeoutError, DeadKernelError
from papermill.exceptions import PapermillExecutionError

from nodules import paths
from nodules.errors import InputError, NotebookFailed, within

KERNEL = "python3"
LITERALS = (bool, int, float, str, list)
REDRAWN = {"plots"}  # a change in these draws figures again (see report) and runs no notebook
ERROR_LINES = 12
LARGEST = 2**63  # of whole numbers, either way: what numpy can hold
MOST_BYTES = 100_000  # of a profile
TIME_LIMIT, SECONDS = "cell_timeout_s", 3600  # that a cell may take: a profile's, but no notebook's parameter


def parameters(notebook: Path) -> dict[str, Any]:
    """Names and defaults in a notebook's one ``parameters`` cell, which holds literals and nothing else.

    Raises:
        InputError: no notebook, no such cell or several, or a line that is no assignment of a literal.
    """
    cells = [cell for cell in _code_cells(notebook) if "parameters" in cell.metadata.get("tags", [])]
    if len(cells) != 1:
        raise InputError(f"{notebook}: {len(cells)} cells are tagged 'parameters'; tag exactly one")
    found = {}
    for statement in ast.parse(cells[0].source).body:
        try:
            (target,) = statement.targets
            found[target.id] = ast.literal_eval(statement.value)
        except (AttributeError, ValueError) as error:
            text = ast.unparse(statement)
            raise InputError(f"{notebook}: parameter {text!r} is no literal; write name = value") from error
        if type(found[target.id]) not in LITERALS:
            raise InputError(f"{notebook}: parameter {target.id} is no bool, int, float, str or list; make it one")
    return found


def typed(name: str, value: Any, default: Any) -> Any:
    """``value`` if it has the type of ``default``; a whole number or ``1e-3``, which YAML reads as text, is a float."""
    if isinstance(default, float) and type(value) in (int, str):
        with suppress(ValueError, OverflowError):
            value = float(value)
    told = reprlib.repr(value)
    if type(value) is not type(default):
        found, kind = type(value).__name__, type(default).__name__
        raise InputError(f"{name}: {told} is {found}, not {kind}; write it as in {name}: {default!r}")
    if (isinstance(value, float) and not math.isfinite(value)) or (isinstance(value, int) and abs(value) > LARGEST):
        raise InputError(f"{name}: {told} is no number to compute with; write it as in {name}: {default!r}")
    if isinstance(value, str) and not value.isprintable():
        raise InputError(f"{name}: {told} holds characters that cannot be printed; leave them out")
    if isinstance(default, list) and default:
        return [typed(name, item, default[0]) for item in value]
    return value


def _yaml(text: str) -> Any:
    """What a YAML text says.

    Raises:
        ValueError: it is none, or asks for more than plain values.
    """
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{' '.join(str(error).split())[:120]}") from error


def read_profile(path: Path) -> dict[str, Any]:
    """A profile: one YAML mapping of ``TIME_LIMIT`` and parameters of at least one notebook each, rightly typed."""
    try:
        if path.stat().st_size > MOST_BYTES:
            raise ValueError(f"more than {MOST_BYTES} bytes")
        profile = _yaml(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:120]
        raise InputError(f"{path}: cannot be read as YAML ({reason}); take params/demo.yaml as a pattern") from error
    if not isinstance(profile, dict):
        raise InputError(f"{path}: no mapping of parameters; write lines such as seed: 0")
    known = [parameters(notebook) for notebook in sorted(paths.NOTEBOOKS.glob("*.ipynb"))]
    for key, value in profile.items():
        defaults = [SECONDS] if key == TIME_LIMIT else [defaults[key] for defaults in known if key in defaults]
        if not defaults:
            name = reprlib.repr(key)
            raise InputError(f"{path}: no notebook has a parameter {name}; correct or remove it")
        for default in defaults:
            typed(key, value, default)
    return profile


def time_limit(profile: dict[str, Any], given: int | None) -> int:
    """Seconds that a cell may take: as given, else as the profile says, else an hour."""
    limit = profile.get(TIME_LIMIT, SECONDS) if given is None else given
    within(1, 10_000_000, **{TIME_LIMIT: limit})
    return limit


def merge(notebook: Path, profile: dict[str, Any], assignments: list[str]) -> dict[str, Any]:
    """A notebook's parameters from a profile, then from ``key=value`` texts.

    Text is taken as it is, so that a folder may be called ``2024-01-05`` or ``on``; other values are typed by YAML.
    """
    defaults = parameters(notebook)
    chosen = {key: value for key, value in profile.items() if key in defaults}
    for text in assignments:
        key, equals, value = text.partition("=")
        told = reprlib.repr(text)
        if not equals or key not in defaults:
            known = ", ".join(defaults)
            raise InputError(f"-p {told}: {notebook.name} has no such parameter; it has {known}")
        try:
            chosen[key] = value if type(defaults[key]) is str else _yaml(value)
        except ValueError as error:
            raise InputError(f"-p {told}: the value is no YAML; put it in quotes") from error
    return {key: typed(key, value, defaults[key]) for key, value in chosen.items()}


def modules(notebook: Path) -> list[Path]:
    """The modules of this package that a notebook uses, directly or through others, drawing code left out."""
    package = Path(__file__).parent
    waiting = list(_imported("\n".join(cell.source for cell in _code_cells(notebook))))
    found: set[str] = set()
    while waiting:
        name = waiting.pop()
        if name not in found | REDRAWN:
            found.add(name)
            waiting += _imported((package / f"{name}.py").read_text(encoding="utf-8"))
    return [package / f"{name}.py" for name in sorted(found)]


def execute(notebook: Path, output: Path, chosen: dict[str, Any], cell_timeout_s: int) -> None:
    """Run ``notebook`` with parameters ``chosen`` and write the executed copy to ``output``.

    Beside it, ``<name>.d`` tells Make which modules it depends on. Where a cell fails, the copy is kept as
    ``<name>.failed.ipynb`` instead.

    Raises:
        InputError: what a cell raised as such.
        NotebookFailed: any other failure of a cell or the kernel.
    """
    _check_home()
    _check_kernel()
    # A notice of torch to its own callers would stand on top of every notebook
    os.environ["PYTHONWARNINGS"] = "ignore::FutureWarning:torch.jit._script"
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
        _write_dependencies(notebook, output, (parameters(notebook) | chosen).get("data"))
    output.with_name(f"{output.stem}.failed.ipynb").unlink(missing_ok=True)


def _failure(notebook: Path, failed: Path, error: Exception) -> InputError | NotebookFailed:
    """What to raise where a cell failed: the input error that it raised, or the cell with the end of its error."""
    if getattr(error, "ename", None) == InputError.__name__:
        return InputError(error.evalue)
    if isinstance(error, DeadKernelError):
        return NotebookFailed(f"{notebook.name}: its kernel died, killed or out of memory; see {failed}")
    lines = [line for line in str(error).splitlines() if line.strip()][-ERROR_LINES:]
    where = ["cell:", error.source] if isinstance(error, PapermillExecutionError) else []
    return NotebookFailed("\n".join([f"{notebook.name}: a cell failed; see {failed}", *where, *lines]))


def _write_dependencies(notebook: Path, output: Path, data: str | None) -> None:
    """Tell Make, in ``<name>.d`` beside an executed notebook, which modules it depends on and what data it was run on.

    A run's folder has the last part of the data's path in its name: other data whose path ends alike make it stale.
    """
    used = [_shown(path) for path in modules(notebook)]
    # An empty rule for each module, as compilers write them, so that a removed module does not stop Make
    lines = [f"{_shown(output)}: {' '.join(used)}", *(f"{path}:" for path in used)]
    if data is not None:
        # Make's DATA has none of its SIGNS, so that a name with one differs from it as it should
        plain = re.sub(r"[\s\"'`\\;:|&<>()\[\]*?%=$#]", "?", data)
        lines += [f'ifneq "$(DATA)" "{plain}"', f"{_shown(output)}: other-data", "endif"]
    with paths.replacing(output.with_suffix(".d")) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _code_cells(notebook: Path) -> list[nbformat.NotebookNode]:
    try:
        cells = nbformat.read(notebook, as_version=4).cells
    except (OSError, ValueError, AttributeError, nbformat.ValidationError) as error:
        reason = " ".join(str(error).split())[:120]
        raise InputError(f"{notebook}: no readable notebook ({reason}); get it again") from error
    return [cell for cell in cells if cell.cell_type == "code"]


def _imported(source: str) -> Iterator[str]:
    """Names of this package's modules that a source imports by ``from nodules import ...`` in any form."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module == "nodules":
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("nodules."):
            yield node.module.removeprefix("nodules.")


def _check_kernel() -> None:
    """A ``python3`` kernel installed for the user would shadow this environment's; refuse it.

    Whatever its path is called: what counts is the environment that it is the interpreter of.
    """
    interpreter = KernelSpecManager().get_kernel_spec(KERNEL).argv[0]
    if interpreter in ("python", "python3", f"python3.{sys.version_info.minor}"):
        return  # jupyter_client puts its own interpreter in their place
    asked = [interpreter, "-c", "import sys; print(sys.prefix)"]
    try:
        prefix = subprocess.run(asked, capture_output=True, text=True, timeout=60, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        prefix = "no interpreter"
    if os.path.realpath(prefix) != os.path.realpath(sys.prefix):
        raise InputError(f"kernel {KERNEL!r}: runs {interpreter}, not {sys.executable}; remove that kernelspec")


def _check_home() -> None:
    """Jupyter keeps the address of a kernel in a folder below the home folder."""
    runtime = Path(jupyter_runtime_dir())
    nearest = next(folder for folder in (runtime, *runtime.absolute().parents) if folder.exists())
    if not (nearest.is_dir() and os.access(nearest, os.W_OK)):
        raise InputError(f"{runtime}: kernels keep files there, and can't; name another home, as in HOME=$PWD/home")


def _step_printer(notebook: Path) -> Callable[..., None]:
    """A hook that prints one line as a code cell ends: its number, its seconds, the heading above it."""
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
        print(f"{title} {done:>3}/{total} {elapsed:7.1f} s  {headings.get(cell.id, 'parameters')}", flush=True)

    return hook


def _shown(path: Path) -> str:
    """A path as the Makefile writes it: relative to the root where it lies below it, links on the way left alone."""
    path = path.absolute()
    return str(path.relative_to(paths.ROOT) if path.is_relative_to(paths.ROOT) else path)
