# SPDX-License-Identifier: Apache-2.0
"""Make data sets of one or more sizes out of a source, in one pass that can be continued."""
import contextlib
import dataclasses
import errno
import functools
import hashlib
import json
import os
import shutil
import time
from collections.abc import Generator
from pathlib import Path

import click
import tqdm

from data_prep import images, sinks, sources
from data_prep.images import Outcome, Plan
from data_prep.journal import Journal, Level, Progress, journal_path, next_link, open_journal
from data_prep.parallel import Interrupted, chunks, default_workers, ordered_map
from data_prep.report import Report, library_versions, make_metadata, make_report, understood
from data_prep.sources.base import Source, read_image
from data_prep.transforms import REVERSIBLE, Size, check_sizes, is_usable, nearest_usable
from dnnlib import UserError
from dnnlib.util import format_bytes, list_some
from training.data.labels import METADATA_NAME
from training.data.report import REPORT_NAME

COMMIT_IMAGES = 1000            # Files between two commits to the journal,
COMMIT_SECONDS = 10             # or time, whichever comes first.
FORMAT = 1                      # Unfinished runs say theirs; those of another one cannot be continued.


@dataclasses.dataclass(frozen=True)
class Job:
    """All that decides the content of the data sets."""

    source: str                                 # As `sources.open_source` takes it.
    dests: tuple[Path, ...]                     # An archive (.zip) or folder for every size.
    sizes: tuple[Size, ...] = ()                # Empty: one data set, of the size that the images have.
    transform: str | None = None                # A name in transforms.TRANSFORMS; None takes square images only.
    grayscale: str | None = None                # 'drop' or 'rgb'; None drops it for ImageNet alone.
    max_images: int | None = None               # Stop after this many images.
    strict: bool = False                        # Stop at the first unreadable file.
    options: sources.SourceOptions = dataclasses.field(default_factory=sources.SourceOptions)


def make_datasets(
    job: Job,
    overwrite: bool = False,            # Replace data sets at the destinations.
    restart: bool = False,              # Throw away an unfinished run instead of continuing it.
    workers: int | None = None,         # Processes; None: all cores for large sources. No effect on the result.
) -> list[tuple[Report, Path, list[str]]]:
    """Convert a source into the official format, one data set per size.

    Returns:
        For every size the report, the destination, and the full names of the first skipped files.

    Raises:
        UserError: the source cannot be used, a destination cannot be written, or an image does not fit the options.
    """
    check_sizes(list(job.sizes), job.transform)
    first = job.dests[0]
    unfinished = journal_path(first).exists() and not restart
    for dest in job.dests:
        check_dest(job.source, dest, overwrite or unfinished)
    source = sources.open_source(job.source, job.options)
    click.echo("\n".join(understood(job.source, source)), err=True)
    workers = workers or default_workers(len(source.indices))
    try:
        with open_journal(first) as journal, contextlib.closing(source.store):
            return _Run(job, source, journal).go(overwrite, restart, workers)
    except OSError as err:
        if err.errno == errno.ENOSPC:
            raise UserError(f"--dest={first}: the disk is full: make room, then run the same command again to "
                            f"continue, or remove {sinks.partial_path(first)}") from err
        raise UserError(f"--dest={first}: cannot be written ({err.strerror or err}): choose another place") from err


def _check_apart(source: str, dest: Path) -> None:
    """Refuse a destination that is the source, lies in it or around it. Raises UserError."""
    origin, target = Path(source).resolve(), dest.resolve()
    if target == origin or target in origin.parents:
        raise UserError(f"--dest={dest}: would replace --source={source}: choose another place")
    if origin.is_dir() and origin in target.parents:
        raise UserError(f"--dest={dest}: lies inside of --source={source}, which it would be a part of the next time: "
                        "choose a place outside")


def check_dest(source: str, dest: Path, overwrite: bool) -> None:
    """Refuse a destination that would do harm. Raises UserError."""
    if not sources.is_named(source):
        _check_apart(source, dest)
    if dest.suffix.lower() in (".tar", ".gz", ".tgz", ".7z", ".rar", ".npz", ".json", ".parquet"):
        raise UserError(f"--dest={dest}: name a .zip archive or a folder")
    archive = sinks.is_archive(dest)
    if not dest.exists() or (dest.is_dir() and not archive and not any(dest.iterdir())):
        return
    if dest.is_dir() == archive:
        raise UserError(f"--dest={dest}: is a {'folder' if dest.is_dir() else 'file'}: choose another name")
    if not overwrite:
        raise UserError(f"--dest={dest}: exists already: choose another name or add --overwrite")
    if dest.is_dir() and not (dest / METADATA_NAME).is_file():
        raise UserError(f"--dest={dest}: is not a data set (it has no {METADATA_NAME}), so --overwrite leaves it "
                        f"alone: choose another name")

def _key(job: Job, source: Source, plan: Plan) -> dict[str, object]:
    """What must be the same to go on with an unfinished run."""
    digest = hashlib.sha256()
    for place, index in enumerate(source.indices):
        label = None if source.labels is None else source.labels[place]
        digest.update(f"{source.store.names[index]}\0{label}\n".encode("utf-8", "surrogateescape"))
    return {
        "format": FORMAT, "source": os.path.abspath(job.source), "files": digest.hexdigest(),
        "stamp": sources.source_stamp(job.source), "classes": source.classes,
        "dests": [dest.name for dest in job.dests], "sizes": [str(size) for size in plan.sizes],
        "transform": plan.transform, "drop_grayscale": plan.drop_grayscale, "max_images": job.max_images,
        "versions": library_versions(),
    }


def _check_space(job: Job, num_files: int) -> None:
    """Warn if the result will not fit: it is known before, because its images are not compressed."""
    count = min(num_files, job.max_images or num_files)
    need = count * sum(3 * size.width ** 2 + 300 for size in job.sizes)
    free = shutil.disk_usage(job.dests[0].parent).free
    if need > free:
        click.echo(f"--dest={job.dests[0]}: up to {format_bytes(need)} will be written, but only "
                   f"{format_bytes(free)} are free", err=True)


def _check_size(progress: Progress, plan: Plan, where: str, outcome: Outcome) -> None:
    """All images are of the size of the first. Raises UserError."""
    levels, (width, height) = progress.levels, outcome.size
    if levels[0].resolution is None:
        if not is_usable(width):
            raise UserError(f"{where}: {width}x{height} pixels, but the size must be a power of two: "
                            f"add --resolution={nearest_usable(width)}")
        progress.first = where
        for level, size in zip(levels, plan.sizes or [Size(width, height)], strict=True):
            level.resolution = size.width
    elif width != levels[0].resolution:
        old = levels[0].resolution
        raise UserError(f"{where}: {width}x{height} pixels, but {progress.first} has {old}x{old}: add "
                        f"--resolution=N to resize square images, and --transform=center-crop for others")

#----------------------------------------------------------------------------

class _Run:
    """One run of a job, fresh or continued."""

    def __init__(self, job: Job, source: Source, journal: Journal):
        self.job, self.source, self.journal = job, source, journal
        drop = job.grayscale == "drop" or (job.grayscale is None and source.is_imagenet)
        self.plan = Plan(job.sizes, job.transform, drop)
        self.progress = Progress([Level() for _ in job.dests])
        self.sinks: list[sinks.Sink] = []
        self.committed = time.monotonic()

    def go(self, overwrite: bool, restart: bool, workers: int) -> list[tuple[Report, Path, list[str]]]:
        continued = self._continue(restart)
        try:
            if not continued:
                for dest in self.job.dests:
                    check_dest(self.job.source, dest, overwrite)
                    sinks.discard(dest)
                _check_space(self.job, len(self.source.indices))
                self.journal.begin(_key(self.job, self.source, self.plan))
            if not self.progress.sealed:
                self._write(workers)
            reports = self._reports()
            for dest in self.job.dests:
                if sinks.partial_path(dest).exists():       # Else it got its name before this run was broken off.
                    sinks.publish(dest)
                dest.with_name(dest.name + ".report.json").unlink(missing_ok=True)      # An older version wrote it.
            self.journal.remove()
            return reports
        except BaseException as err:
            keep = isinstance(err, Interrupted | OSError) or not isinstance(err, UserError)
            if not keep or not any(level.mark for level in self.progress.levels):
                self._throw_away()
            elif isinstance(err, KeyboardInterrupt):
                click.echo("\nUnfinished: the same command continues", err=True)
            raise
        finally:
            for sink in self.sinks:
                sink.close()

    def _open_sinks(self) -> None:
        for dest, level in zip(self.job.dests, self.progress.levels, strict=True):
            self.sinks.append(sinks.open_sink(dest, level.sizes, level.crcs, level.mark or None))

    def _throw_away(self) -> None:
        for sink in self.sinks:
            sink.close()
        for dest in self.job.dests:
            sinks.discard(dest)
        self.journal.remove()

    def _continue(self, restart: bool) -> bool:
        """Take up an unfinished run, if there is one. Raises UserError if it is another one."""
        found, progress = self.journal.read(len(self.job.dests))
        if not isinstance(found, dict) or not progress.done or restart:
            return False
        key = json.loads(json.dumps(_key(self.job, self.source, self.plan)))
        if found != key:
            other = sorted(name for name in key if found.get(name) != key[name])
            raise UserError(f"--dest={self.job.dests[0]}: an unfinished run is there that differs in "
                            f"{list_some(other)}: repeat its command to continue it, or add --restart to throw it away")
        self.progress = progress
        self.journal.go_on()
        if not progress.sealed:
            self._open_sinks()
        click.echo(f"Continuing at file {progress.done} of {len(self.source.indices)}", err=True)
        return True

    #------------------------------------------------------------------------

    def _write(self, workers: int) -> None:
        if not self.sinks:
            self._open_sinks()
        progress, start, total = self.progress, self.progress.done, len(self.source.indices)
        with contextlib.closing(self._outcomes(start, workers)) as steps:
            for outcome in tqdm.tqdm(steps, total=total, initial=start, unit="images", disable=None):
                if progress.written == self.job.max_images:
                    break
                self._take(outcome)
                progress.done += 1
                if progress.done % COMMIT_IMAGES == 0 or time.monotonic() > self.committed + COMMIT_SECONDS:
                    self._commit()
        if not progress.written:
            names = [f"{self.source.store.where(self.source.indices[place])} ({reason})"
                     for place, reason in progress.skipped]
            raise UserError(f"--source={self.job.source}: no image could be converted: "
                            f"{list_some(names) or 'all are grayscale'}: nothing was written")
        metadata = make_metadata(self.source, progress).encode()
        for sink, (report, _dest, _where) in zip(self.sinks, self._reports(), strict=True):
            sink.seal({METADATA_NAME: metadata, REPORT_NAME: report.to_json().encode()})
        progress.sealed = True
        self._commit()

    def _outcomes(self, start: int, workers: int) -> Generator[Outcome, None, None]:
        """One outcome per file from a place on, in order; files are read here and decoded in the workers."""
        store = self.source.store
        files = ((store.where(i), read_image(store, i)) for i in self.source.indices[start:])
        blocks = chunks(files, lambda file: len(file[1]))
        for block in ordered_map(functools.partial(images.convert_chunk, self.plan), blocks, workers):
            yield from block

    def _commit(self) -> None:
        for level, sink in zip(self.progress.levels, self.sinks, strict=True):
            level.mark = sink.sync()
        self.journal.commit(self.progress)
        self.committed = time.monotonic()

    def _take(self, outcome: Outcome) -> None:
        """Write the images of one file, or note why there are none. Raises UserError if that is not allowed."""
        progress, place = self.progress, self.progress.done
        if outcome.dropped:
            progress.dropped.append(place)
            return
        where = self.source.store.where(self.source.indices[place])
        if outcome.refused:
            raise UserError(outcome.refused)
        if not outcome.pngs:
            if self.job.strict:
                raise Interrupted(f"{where}: cannot be converted ({outcome.reason}): mend or remove it, or leave out "
                                  f"--strict")
            progress.skipped.append((place, outcome.reason))
            return
        _check_size(self.progress, self.plan, where, outcome)
        label = None if self.source.labels is None else self.source.labels[place]
        for i, (level, sink) in enumerate(zip(progress.levels, self.sinks, strict=True)):
            sink.write(outcome.pngs[i])
            level.chain = next_link(level.chain, outcome.digests[i], label)
            level.enlarged += bool(outcome.enlarged and outcome.enlarged[i])
        if self.plan.transform in REVERSIBLE:
            progress.shapes.append(list(outcome.source_size))
        progress.written += 1
        for note in outcome.notes:
            progress.conversions[note] = progress.conversions.get(note, 0) + 1

    def _reports(self) -> list[tuple[Report, Path, list[str]]]:
        where = [self.source.store.where(self.source.indices[place]) for place, _ in self.progress.skipped[:5]]
        shown = [str(size) for size in self.plan.sizes] or [""]
        written = self.progress.places()
        return [(make_report(self.source, written, level, self.progress, self.plan.transform, size), dest, where)
                for dest, level, size in zip(self.job.dests, self.progress.levels, shown, strict=True)]
