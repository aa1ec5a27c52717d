"""The command line: ``python -m nodules run | report | export | slides | assignment | grades | bench | messages``.

Bad input ends with one line and exit code 2.
"""

import argparse
import os
import sys
from pathlib import Path

from nodules.errors import InputError, NotebookFailed


def _run(arguments: argparse.Namespace) -> None:
    from nodules.tools import run

    profile = run.read_profile(arguments.profile) if arguments.profile else {}
    chosen = run.merge(arguments.notebook, profile, arguments.parameter)
    limit = run.time_limit(profile, arguments.cell_timeout_s)
    run.execute(arguments.notebook, arguments.output, chosen, limit)


def _report(arguments: argparse.Namespace) -> None:
    from nodules.report import page

    print(page.build(arguments.run_dir, arguments.folder, arguments.readme))
    print(page.minutes(arguments.run_dir))


def _export(arguments: argparse.Namespace) -> None:
    from nodules.data import export, patches, split

    held = patches.read(arguments.data)
    print(export.to_folders(held, split.assign(held.table, arguments.split, arguments.seed), arguments.folder))


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
