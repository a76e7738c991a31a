"""Load all schedules of a file, a folder or a repository on the Hugging Face Hub, by their number of steps."""

from __future__ import annotations

from pathlib import Path

from diffcache.documents import container, hub
from diffcache.documents.schedule import CacheSchedule
from diffcache.documents.schedule_set import ScheduleSet
from diffcache.documents.token_schedule import TokenSchedule
from diffcache.errors import BadOption

PATTERN = "schedule*.safetensors"  # on the Hub, where other safetensors files may be weights of many gigabytes


def read_schedules(path: str | Path) -> CacheSchedule | ScheduleSet | TokenSchedule:
    """Return the schedule, the schedule set or the token schedule in a file.

    Raises:
        DocumentError: If the file holds none of them.
    """
    found = container.format_in(Path(path))
    kinds: tuple[type[ScheduleSet | TokenSchedule], ...] = (ScheduleSet, TokenSchedule)
    for kind in kinds:
        if found == kind.FORMAT:
            return kind.load(path)
    return CacheSchedule.load(path)


def schedules_in(id_or_folder: str | Path) -> dict[int, CacheSchedule]:
    """Return the schedules of a folder or repository, number of steps -> schedule.

    Of a schedule set, all schedules count. Files of other formats are left out. Of a repository, only files whose names
    begin with ``schedule`` are read. If several schedules have one number of steps, ``schedule.safetensors`` is used.

    Args:
        id_or_folder: A folder, or the id of a repository if there is no folder of that name.

    Raises:
        HubUnavailable: If the repository cannot be reached.
        DocumentError: If there is no schedule, or one is damaged.
        BadOption: If two schedules have one number of steps, and neither is ``schedule.safetensors``.
    """
    folder = hub.folder(id_or_folder, PATTERN)
    names = [] if folder is None else _schedules(folder)
    if folder is None or not names:  # raises an error that says which file is missing
        only = CacheSchedule.from_pretrained(id_or_folder)
        return {only.steps: only}
    found: dict[int, tuple[Path, CacheSchedule]] = {}
    for path in sorted(names, key=lambda path: (path.name != CacheSchedule.FILENAME, path.name)):
        document = read_schedules(path)
        if isinstance(document, TokenSchedule):
            continue
        for schedule in document.schedules.values() if isinstance(document, ScheduleSet) else [document]:
            before = found.setdefault(schedule.steps, (path, schedule))[0]
            if before is not path and before.name != CacheSchedule.FILENAME:
                allowed = f"one schedule for each number of steps: {before.name} and {path.name} both hold one of "
                raise BadOption(
                    "schedule", str(id_or_folder), f"{allowed}{schedule.steps} steps. Name the file instead"
                )
    return {steps: schedule for steps, (_, schedule) in sorted(found.items())}


def _schedules(folder: Path) -> list[Path]:
    """Return the schedules and schedule sets directly in a folder."""
    formats = (CacheSchedule.FORMAT, ScheduleSet.FORMAT)
    return [path for path in folder.glob("*.safetensors") if container.format_in(path) in formats]
