"""The command line: ``labelaug run | book | claims | train | results | data | bench``.

Imports of what a command needs stand inside it, so that ``labelaug --help`` answers at once.
"""

import errno
import os
import sys
from pathlib import Path

import click

# What the machine can refuse; any other OSError is a bug and shows its traceback.
REFUSED = {
    getattr(errno, name)
    for name in "EACCES EPERM EROFS ENOSPC EDQUOT EFBIG ENOTDIR EISDIR EEXIST EMFILE ENFILE EIO".split()
    if hasattr(errno, name)
}


class _Group(click.Group):
    """One sentence for what a user can mend: the package's own exceptions, and what cannot be read or written."""

    def main(self, *arguments, **options):
        _open_streams()
        try:
            return super().main(*arguments, **options)
        except OSError as error:  # outside of all commands: the help cannot be written
            if error.errno not in REFUSED:
                raise
            _refusal(error).show()
            sys.exit(1)
        finally:
            _drop_unwritten()

    def invoke(self, context):
        try:
            result = super().invoke(context)
            sys.stdout.flush()  # a full disk is told here, not by the interpreter at its end
            return result
        except Exception as error:
            if type(error).__module__.startswith("labelaug."):
                raise click.ClickException(str(error).replace("\n", "\nError: ")) from None
            if isinstance(error, OSError) and error.errno in REFUSED:
                raise _refusal(error) from None
            raise


def _refusal(error: OSError) -> click.ClickException:
    what = error.filename or "a file or the output"
    return click.ClickException(f"cannot use {what}: {error.strerror}; free space or make it writable")


def _open_streams() -> None:
    """Let a closed standard stream lead to nowhere, lest a file get its number; escape what an encoding lacks."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            number = os.open(os.devnull, os.O_RDWR)  # the least that is free: the stream's own
            os.set_inheritable(number, True)
            setattr(sys, name, open(number, mode, encoding="utf-8"))
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's has no encoding
        sys.stdout.reconfigure(errors="backslashreplace")  # as Python itself does for standard error


def _drop_unwritten() -> None:
    """Forget output that could not be written, which was told: the interpreter would try once more at its end."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _print(text: str) -> None:
    """A line on standard output in its own encoding, where click.echo would take ASCII for a mistake."""
    click.echo(text, file=sys.stdout)


class _ProjectCommand(click.Command):
    """A command that works on the project's own notebooks, book or benchmarks, and says so where there are none."""

    def invoke(self, context):
        from labelaug import paths

        paths.checkout()
        return super().invoke(context)


def _version(context, option, value):
    """The version that pip knows; a package that was only copied has none."""
    if value:
        from importlib.metadata import PackageNotFoundError, version

        try:
            _print(f"labelaug {version('labelaug')}")
        except PackageNotFoundError:
            raise click.ClickException(
                "the package was copied, not installed by pip: its version is not known"
            ) from None
        context.exit()


def _data_dir(context, option, value):
    """Use the folder of --data-dir here and in every child process."""
    if value is not None:
        from labelaug import paths

        folder = paths.data_dir(value)
        if not folder.is_dir():
            raise click.BadParameter(f"there is no folder '{value}'; name the one that holds the image sets")
        os.environ["LABELAUG_DATA"] = str(folder.resolve())


def _overrides(context, option, pairs):
    names = [name for name, _ in pairs]
    for name in names:
        if names.count(name) > 1:
            raise click.BadParameter(f"{name} is set {names.count(name)} times")
    return dict(pairs)


def _fetch(settings):
    """Try to download the image sets that sections read under their parameters and that are not in the data folder.

    A set that cannot be had is no error here: its section says so on its page and runs on the digits.
    Args: settings: section -> its parameters, as ``resolve_all`` gives them.
    """
    from labelaug import notebooks, paths

    names = [name for section, parameters in settings.items() for name in notebooks.image_sets(section, parameters)]
    for name in dict.fromkeys(names):
        from labelaug.data import images  # slow to import, and most sections read no images

        if not images.is_there(name, paths.data_dir()):
            try:
                images.download(name, paths.data_dir())
            except images.DataMissing as error:
                click.echo(f"{error}; its section runs on scikit-learn's digits", err=True)


profile_option = click.option(
    "--profile",
    type=click.Choice(["smoke", "default", "paper"]),
    default="default",
    show_default=True,
    help="Parameters: the notebooks' own, tiny ones (smoke), or the papers' in full (paper).",
)
data_option = click.option(
    "--data-dir",
    metavar="FOLDER",
    callback=_data_dir,
    expose_value=False,
    is_eager=True,
    help="Image sets; else $LABELAUG_DATA, else ~/.cache/labelaug.",
)
jobs_option = click.option(
    "--jobs", type=click.IntRange(min=1), help="Notebooks at once.  [default: one per core, as many as are stale]"
)
force_option = click.option("--force", is_flag=True, help="Run what is current too.")
json_option = click.option("--json", "as_json", is_flag=True, help="Rows as JSON.")


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option("--version", is_flag=True, expose_value=False, is_eager=True, callback=_version, help="Show the version.")
def main():
    """Label smoothing and Mixup, studied: run the sections, build the book, read the claims."""
    os.environ["PYTHONSAFEPATH"] = "1"  # no process that we start takes a module from the folder where we are called


@main.command(cls=_ProjectCommand)
@click.argument("notebooks", nargs=-1, metavar="[NOTEBOOK]...")
@profile_option
@click.option(
    "-p",
    "overrides",
    nargs=2,
    multiple=True,
    metavar="NAME VALUE",
    callback=_overrides,
    help='Set a parameter of each notebook that has it; a list as "[0.1, 0.2]". May be repeated.',
)
@force_option
@jobs_option
@data_option
def run(notebooks, profile, overrides, force, jobs):
    """Run the notebooks that are not current.

    NOTEBOOK is a section such as 02_synthetic_sweep, its beginning (02), or the path of its file; none means all.
    """
    from labelaug import results
    from labelaug.notebooks import match, resolve_all, run_sections

    results.commit()  # a wrong $LABELAUG_COMMIT is told first, too
    names = match(notebooks)
    _fetch(resolve_all(names, profile, overrides))  # a mistake is told before anything is downloaded
    runs = run_sections(names, profile=profile, overrides=overrides, force=force, jobs=jobs)
    for finished in runs:
        _print(f"{finished.section}: {finished.path / 'notebook.ipynb'}")


@main.command(cls=_ProjectCommand)
@profile_option
@force_option
@jobs_option
@data_option
def book(profile, force, jobs):
    """Run what is stale, then build the pages."""
    import time

    from labelaug import agreement, claims, results
    from labelaug import book as pages
    from labelaug.notebooks import resolve_all, run_sections, sections

    started = time.perf_counter()
    results.commit()
    _fetch(resolve_all(sections(), profile))
    runs = {finished.section: finished.path for finished in run_sections(profile=profile, force=force, jobs=jobs)}
    rows = claims.evaluate(runs)
    generated = {
        "ledger.md": claims.ledger_markdown(rows),
        "headline.md": claims.headline_markdown(rows),
        "execution.md": claims.execution_markdown(runs),
        "agreement.md": agreement.markdown(agreement.load()),
    }
    index = pages.build(pages.assemble(runs, generated))
    _print(f"{index} ({time.perf_counter() - started:.0f} s)")


@main.command("claims", cls=_ProjectCommand)
@json_option
@profile_option
@data_option
def claims_command(as_json, profile):
    """Print each claim, our number, the verdict."""
    import codecs
    import json
    import re

    from labelaug import claims
    from labelaug.notebooks import current_runs

    rows = claims.evaluate(current_runs(profile)[0])
    if as_json:
        holds_all = codecs.lookup(sys.stdout.encoding).name.startswith("utf")
        return _print(json.dumps(rows, indent=1, ensure_ascii=not holds_all, allow_nan=False))
    for row in rows:
        claim = re.sub(r"\{[\w:]+\}`(?:[^`<]*<)?([^`<>]*)>?`", r"\1", row["claim"])  # a role of MyST is its label here
        _print(f"{row['id']:8} {claims.number(row):28} {row['verdict']:16} {claim}")
        if row["why"]:
            _print(f"{'':8} {row['why']}")


@main.command()
@click.argument("study", metavar="STUDY")
@click.option(
    "--scale",
    type=click.Choice(["smoke", "cpu", "gpu", "paper"]),
    default="smoke",
    show_default=True,
    help="Seconds, for a test; real data on a few cores; a quarter of an hour of a GPU; or the paper's own grid.",
)
@click.option("--workers", type=click.IntRange(min=1), default=1, show_default=True, help="Trials at once, here.")
@click.option("--scheduler", metavar="ADDRESS", help="Run on this dask cluster in place of here.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), help="[default: cuda if torch has one, else cpu]")
@click.option(
    "--minutes",
    type=click.FloatRange(min=0, min_open=True),
    metavar="M",
    help="Begin no trial after M minutes; running ones stop after their epoch, with a checkpoint.",
)
@click.option(
    "--runs",
    type=click.Path(file_okay=False, path_type=Path),
    help="Results and checkpoints.  [default: results/runs of the project, or here if the package lies outside it]",
)
@data_option
@click.option("--list", "only_list", is_flag=True, help="Print each trial and how far it is; train nothing.")
def train(study, scale, workers, scheduler, device, minutes, runs, only_list):
    """Train the trials of STUDY that have no result yet, then merge the results.

    What was stopped, in whatever way, goes on from its checkpoints with the same command.
    """
    import torch

    from labelaug import engine, paths, results
    from labelaug.studies import STUDIES

    if study not in STUDIES:
        raise click.BadParameter(f"'{study}' is no study; there are: {', '.join(STUDIES)}", param_hint="STUDY")
    try:
        trials = STUDIES[study](scale)
    except ValueError as error:  # not every study has every scale
        raise click.BadParameter(str(error), param_hint="'--scale'") from None
    folder = paths.results_dir()
    runs = runs or folder / "runs"
    if only_list:
        for trial in trials:
            state, seconds = engine.status(trial, runs)
            cost = "" if seconds is None else f"{seconds:.1f} s"
            _print(f"{trial.key}  {state:24} {cost:>10}  {trial.label}")
        return
    results.commit()  # a wrong $LABELAUG_COMMIT is told before anything is trained
    if not paths.is_checkout():
        click.echo(f"outside the project's folder: trials go to {runs}, what is merged to {folder}", err=True)
    if scheduler is None:
        data_dir = paths.data_dir()
    else:  # each worker's own, unless it is named here
        data_dir = Path(os.environ["LABELAUG_DATA"]) if os.environ.get("LABELAUG_DATA") else None
    try:
        engine.run_trials(
            trials,
            runs=runs,
            data_dir=data_dir,
            device=device or ("cuda" if torch.cuda.is_available() else "cpu"),
            workers=workers,
            scheduler=scheduler,
            minutes=minutes,
        )
    finally:  # trials that were finished before something stopped the rest are merged too
        merged = engine.merge(study, scale, runs=runs, folder=runs if scale == "smoke" else folder)
        if merged:
            _print(merged)


@main.command("results")
def results_command():
    """Print what the committed results of studies are and where they come from."""
    from labelaug import paths, results
    from labelaug.studies import SCALES, STUDIES

    folder = paths.results_dir()
    files = [folder / f"{study}-{scale}.parquet" for study in sorted(STUDIES) for scale in SCALES]
    files = [path for path in files if path.exists()]  # whatever else lies in the folder is not ours
    if not files:
        raise click.ClickException(f"no results of a study in {folder}: train one there with `labelaug train`")
    for path in files:
        found = results.load_study(*path.stem.rsplit("-", 1), folder=path.parent)
        trials = found.trials
        _print(f"{path.name}: {found.study} at scale {found.scale}")
        _print(f"  {len(trials)} trials, seeds {', '.join(str(seed) for seed in sorted(set(found.rows['seed'])))}")
        _print(f"  {trials['seconds'].sum() / 3600:.2f} hours on {'; '.join(sorted(set(trials['device'])))}")
        commits = sorted({f"{row.commit[:7]}{' with changes' if row.dirty else ''}" for row in trials.itertuples()})
        _print(f"  {trials['created'].min()[:10]} to {trials['created'].max()[:10]}, commits {', '.join(commits)}")


@main.command()
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
@click.option("--data-dir", metavar="FOLDER", help="Where to; else $LABELAUG_DATA, else ~/.cache/labelaug.")
def data(names, data_dir):
    """Verify or download image sets.

    NAME is cifar10, cifar100, mnist, fashion-mnist, svhn, or that of a NAME.npz of your own in the folder.
    """
    from labelaug import paths
    from labelaug.data import images

    folder = paths.data_dir(data_dir)
    for name in names:
        try:
            found = images.download(name, folder)
        except ValueError as error:  # not a name that an image set can have
            raise click.BadParameter(str(error), param_hint="NAME") from None
        _print(
            f"{name}: {len(found.x_train)} + {len(found.x_test)} images of {len(found.classes)} classes in {folder}, "
            f"checksum {found.checksum[:12]}"
        )


@main.command(cls=_ProjectCommand)
@json_option
@click.option("--quick", is_flag=True, help="Fewer repetitions.")
def bench(as_json, quick):
    """Time the trainers and the exact minimisers on this machine.

    Each row holds them against what one would otherwise write, in the same run.
    """
    import importlib.util
    import json

    import torch

    from labelaug import paths

    rows = {}
    for name in ("minimisers", "toy", "linear", "deep", *(["gpu"] if torch.cuda.is_available() else [])):
        spec = importlib.util.spec_from_file_location(name, paths.PROJECT / "benchmarks" / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        if as_json:
            rows[name] = list(module.measure(quick=quick))
        else:
            module.main(quick=quick)
    if as_json:
        _print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
