"""The command line: ``python -m nodules`` and ``run | sweep | report | export | fetch | cut | predict | teach``.

Also ``slides | assignment | grades | bench | messages``.

Bad input ends with one line and exit code 2.
"""

import argparse
import os
import re
import sys
from pathlib import Path

from nodules.errors import InputError, NotebookFailed


def _run(arguments: argparse.Namespace) -> None:
    from nodules.tools import run

    profile = run.read_profile(arguments.profile) if arguments.profile else {}
    chosen = run.merge(arguments.notebook, profile, arguments.parameter)
    limit = run.time_limit(profile, arguments.cell_timeout_s)
    run.execute(arguments.notebook, arguments.output, chosen, limit)


def _sweep(arguments: argparse.Namespace) -> None:
    from nodules.tools import sweep

    print(sweep.sweep(arguments.sweep, arguments.folder, arguments.scheduler, arguments.store))


def _report(arguments: argparse.Namespace) -> None:
    from nodules.report import page

    print(page.build(arguments.run_dir, arguments.folder, arguments.readme))
    print(page.minutes(arguments.run_dir))


def _export(arguments: argparse.Namespace) -> None:
    from nodules.data import export, patches, split

    held = patches.read(arguments.data)
    print(export.to_folders(held, split.assign(held.table, arguments.split, arguments.seed), arguments.folder))


def _teach(arguments: argparse.Namespace) -> None:
    from nodules.tools import teach

    options = {name: getattr(arguments, name) for name in ("credit", "folds", "epochs", "phantom", "seed")}
    print(teach.teach(arguments.data, arguments.output, **options))


def _ending(path: Path | None, suffix: str) -> None:
    """Refuse a name that may be that of something else, such as the scan itself."""
    if path and (path.suffix.lower() != suffix or path.is_dir()):
        raise InputError(f"{path}: is no name of a file that ends in {suffix}; give one that does")


def _cut(arguments: argparse.Namespace) -> None:
    from nodules import paths
    from nodules.data import cut

    _ending(arguments.output, ".npz")
    with paths.replacing(arguments.output) as temporary:
        parts = arguments.output.with_name(f".{arguments.output.name}.parts")
        told = cut.dataset(arguments.folder, temporary, parts, arguments.workers, arguments.pseudonym)
    print(*told, arguments.output, sep="\n")


def _predict(arguments: argparse.Namespace) -> None:
    from nodules import model
    from nodules.tools import predict

    _ending(arguments.output, ".csv")
    _ending(arguments.report, ".html")
    if arguments.output and arguments.csv and arguments.output.resolve() == arguments.csv.resolve():
        raise InputError(f"{arguments.output}: is the table of places; write the answers to another file")
    taught = model.load(arguments.model or model.DEFAULT)
    table = predict.table(arguments.at, arguments.csv, arguments.unit)
    judged = predict.judge(taught, arguments.source, table, arguments.series)
    print(predict.predict(taught, judged, arguments.output, arguments.report))


def _fetch(arguments: argparse.Namespace) -> None:
    from nodules import paths
    from nodules.tools import fetch

    if arguments.what == "kaggle":
        print(fetch.kaggle(arguments.folder or paths.DATA))
    else:
        print(fetch.lidc(arguments.folder or paths.DATA / "lidc-idri", arguments.patients))


def _slides(arguments: argparse.Namespace) -> None:
    from nodules.tools import slides

    print(slides.write(arguments.run_dir, arguments.folder))


def _assignment(arguments: argparse.Namespace) -> None:
    from nodules.tools import assignment

    print("\n".join(map(str, assignment.release(arguments.folder))))


def _grades(arguments: argparse.Namespace) -> None:
    from nodules.tools import assignment

    print(assignment.grade(arguments.folder, arguments.submissions, arguments.cell_timeout_s))


def _bench(arguments: argparse.Namespace) -> None:
    from nodules.tools import bench

    bench.main()


def _messages(arguments: argparse.Namespace) -> None:
    from nodules.tools import messages

    print(messages.write())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m nodules", description=__doc__.replace("`", ""))
    commands = parser.add_subparsers(required=True)

    run = commands.add_parser("run", help="execute a notebook")
    run.add_argument("notebook", type=Path)
    run.add_argument("output", type=Path, help="path of the executed copy")
    run.add_argument("--profile", type=Path, help="a YAML file of parameters, such as params/demo.yaml")
    run.add_argument("-p", dest="parameter", action="append", default=[], metavar="KEY=VALUE", help="set a parameter")
    run.add_argument("--cell-timeout-s", type=int, help="seconds a cell may take (3600)")
    run.set_defaults(do=_run)

    sweep = commands.add_parser("sweep", help="execute notebooks many times, with other seeds, splits or data")
    sweep.add_argument("sweep", type=Path, help="a YAML file, such as params/sweeps/headline.yaml")
    sweep.add_argument("folder", type=Path, help="gets the report")
    sweep.add_argument("--scheduler", default="", help="a running Dask scheduler, such as tcp://host:8786")
    sweep.add_argument("--store", default="", help="where results go: a folder or a URL (runs/sweeps/NAME)")
    sweep.set_defaults(do=_sweep)

    report = commands.add_parser("report", help="draw a run's figures and write results.json and report.html")
    report.add_argument("run_dir", type=Path)
    report.add_argument("folder", type=Path)
    report.add_argument("--readme", type=Path, help="a README whose table of results to update")
    report.set_defaults(do=_report)

    export = commands.add_parser("export", help="write train|valid|test/malignant|benign/*.png")
    export.add_argument("folder", type=Path)
    export.add_argument("--data", default="phantom")
    export.add_argument("--split", default="auto")
    export.add_argument("--seed", type=int, default=0)
    export.set_defaults(do=_export)

    teach = commands.add_parser("teach", help="teach a model to hand over; writes .safetensors, .json and a card, .md")
    teach.add_argument("data", help="as DATA= of make figures: phantom, kaggle, a folder, or an npz or HDF5 file")
    teach.add_argument("-o", dest="output", type=Path, required=True, help="its name, ending in .safetensors")
    teach.add_argument("--credit", default="", help="whose data these are and their licence, for the model's card")
    teach.add_argument("--folds", type=int, default=5, help="networks; each leaves out one fold of patients (5)")
    teach.add_argument("--epochs", type=int, default=20, help="passes over the nodules (20)")
    teach.add_argument(
        "--phantom", type=int, default=6691, help="simulated patches to learn from beside real ones (6691)"
    )
    teach.add_argument("--seed", type=int, default=0)
    teach.set_defaults(do=_teach)

    fetch = commands.add_parser("fetch", help="download real data")
    fetch.add_argument("what", choices=["kaggle", "lidc"])
    fetch.add_argument("--folder", type=Path, help="where to (data, or data/lidc-idri)")
    fetch.add_argument("--patients", default="20", help="of lidc: how many, or all (20)")
    fetch.set_defaults(do=_fetch)

    cut = commands.add_parser("cut", help="cut patches out of scans, into a file in this project's format")
    cut.add_argument("folder", type=Path, help="LIDC-IDRI, LUNA16, or scans with a CSV: series, x, y, z, unit")
    cut.add_argument("-o", dest="output", type=Path, required=True, help="the npz file to write")
    cut.add_argument("--workers", type=int, default=0, help="processes (one per core)")
    cut.add_argument("--pseudonym", type=Path, metavar="KEYFILE", help="replace ids by hashes keyed with this file")
    cut.set_defaults(do=_cut)

    predict = commands.add_parser("predict", help="ask a model about nodules in a scan, or about patches")
    predict.add_argument(
        "source", type=Path, help="a folder of DICOM files, a .mhd, .nii.gz, ... file, or patches (npz)"
    )
    where = predict.add_mutually_exclusive_group()
    where.add_argument(
        "--at", metavar="X,Y,Z", help="where the nodule is: three numbers; of several, apart by semicolons"
    )
    predict._negative_number_matcher = re.compile(r"^-[\d.]")  # else -50,20,-120 is taken for an option
    where.add_argument("--csv", type=Path, help="a table of places: x, y, z, and perhaps unit, series, nodule, patient")
    units = predict.add_mutually_exclusive_group()
    units.add_argument(
        "--mm", dest="unit", action="store_const", const="mm", default="", help="x, y, z are in mm (LPS)"
    )
    units.add_argument("--voxel", dest="unit", action="store_const", const="voxel", help="they are column, row, slice")
    predict.add_argument("--series", default="", help="which of several scans: the end of its SeriesInstanceUID")
    predict.add_argument("--model", type=Path, help="a model's .safetensors file or folder (weights/lidc-small)")
    predict.add_argument("-o", dest="output", type=Path, help="write the answers as CSV")
    predict.add_argument("--report", type=Path, metavar="PAGE.html", help="write a page with a sheet for each nodule")
    predict.set_defaults(do=_predict)

    slides = commands.add_parser("slides", help="write a run's notebooks as slides")
    slides.add_argument("run_dir", type=Path)
    slides.add_argument("folder", type=Path)
    slides.set_defaults(do=_slides)

    assignment = commands.add_parser("assignment", help="write the exercises as assignments, without solutions")
    assignment.add_argument("folder", type=Path)
    assignment.set_defaults(do=_assignment)

    grades = commands.add_parser("grades", help="execute and grade submissions: other people's code")
    grades.add_argument("folder", type=Path, help="as written by assignment; gets grades.csv")
    grades.add_argument("submissions", type=Path, help="holds student/lesson.ipynb or student/lesson/lesson.ipynb")
    grades.add_argument("--cell-timeout-s", type=int, default=60, help="seconds a cell may take (60)")
    grades.set_defaults(do=_grades)

    commands.add_parser("bench", help="measure speed and memory").set_defaults(do=_bench)
    commands.add_parser("messages", help="write docs/errors.md").set_defaults(do=_messages)
    return parser


def main() -> int:
    """Run the command; return 0 for success, 1 for a failed notebook, 2 for bad input, 130 when interrupted."""
    arguments = _parser().parse_args()
    # Progress bars, those of kernels too, are updated every ten seconds, not ten times a second
    os.environ.setdefault("TQDM_MININTERVAL", "10")
    try:
        arguments.do(arguments)
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except NotebookFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
