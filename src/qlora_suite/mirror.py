"""output.mirror: a second place for each verified checkpoint, from which a run goes on that has lost its own.

A mirror may be a drive that is full, slow or not there: that is said, and never ends a run.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlora_suite import checkpoint, disk_space
from qlora_suite.run_place import check_links
from qlora_suite.tracking import say


def check_mirrored(mirror: Path, now: Mapping[str, Any]) -> None:
    """Raises ValueError if the mirror holds the checkpoints of another run, which this one would prune."""
    try:
        found = checkpoint.steps(mirror / "checkpoints")
        then = checkpoint.read_state(mirror / "checkpoints" / f"step-{found[-1]:06d}").identity if found else now
    except (OSError, ValueError, TypeError):  # not there, or damaged
        return
    keys = (then.keys() | now.keys()) - checkpoint.changed_rewards(then, now).keys()
    if differs := sorted(key for key in keys if then.get(key) != now.get(key)):
        raise ValueError(
            f"output.mirror: {mirror} holds checkpoints of another run (its {', '.join(differs[:3])} differ), which this one would prune; "
            "name a folder of its own"
        )


def copy_to(mirror: Path, written: Path, keep: int, best: int | None) -> None:
    """Copy a checkpoint to the mirror, and prune there; on a full disk, after making room. Raises OSError; nothing half stays."""
    copies = mirror / "checkpoints"
    try:
        refuse_links(mirror)
        try:
            checkpoint.copy_checked(written, copies / written.name)
        except OSError as error:
            if not (disk_space.is_full(error) and checkpoint.make_room(copies, best)):
                raise
            checkpoint.copy_checked(written, copies / written.name)
        checkpoint.prune(copies, keep, best)
    except OSError:
        if not (copies / written.name / checkpoint.MANIFEST).is_file():  # the manifest goes last
            shutil.rmtree(copies / written.name, ignore_errors=True)
        raise


def restore_from(mirror: Path, checkpoints: Path) -> None:
    """Bring back the newest good checkpoint, and the best one if it is good, for a run that has none of its own."""
    found = checkpoint.latest(mirror / "checkpoints")
    if found is None:
        return
    say(f"{checkpoints} holds none; taking {found} from the mirror")
    best = checkpoint.read_state(found).best
    wanted = [found.with_name(f"step-{int(best['step']):06d}")] if best else []
    for source in (*(w for w in wanted if w != found and w.is_dir()), found):  # the newest last: then all are there
        if source != found and (complaint := checkpoint.complaint_about_checkpoint(source)):
            say(f"the best one, {source}, is damaged ({complaint}) and is left behind")
            continue
        aside = checkpoints / f".{source.name}.tmp"  # a copy cut short must not look like a damaged checkpoint
        checkpoint.copy_checked(source, aside)
        aside.rename(checkpoints / source.name)


def refuse_links(folder: Path) -> None:
    """`check_links` for a run that is under way: OSError, as for a disk that does not take a save."""
    try:
        check_links(folder)
    except ValueError as error:
        raise OSError(str(error)) from None
