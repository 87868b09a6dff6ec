"""The newest checkpoint of a run that is complete and undamaged."""

from pathlib import Path

from reference_trainer.checkpoint.format import FORMAT, MANIFEST
from reference_trainer.checksums import read_sealed, verify
from reference_trainer.distributed import World
from reference_trainer.errors import DamagedError, UserError
from reference_trainer.logging.console import log


def complete_checkpoints(directory: Path) -> list[Path]:
    """Return the checkpoints that have a manifest, oldest first."""
    return sorted(path.parent for path in directory.glob(f"step-*/{MANIFEST}"))


def find_checkpoint(directory: Path, world: World) -> Path | None:
    """Return the first process's `newest_sound` on every process, and warn of any damage.

    Raises:
        SharedError: if there are complete checkpoints and all are damaged.
    """

    def sound() -> tuple[str | None, list[str]]:
        newest, damages = newest_sound(directory)
        return str(newest) if newest else None, damages

    newest, damages = world.on_first(sound)
    if world.first:
        for damage in damages:
            goes_on = f"continuing from {Path(newest).name}" if newest else "starting again"
            log.warning(f"{damage}: {goes_on}")
    return Path(newest) if newest else None


def newest_sound(directory: Path) -> tuple[Path | None, list[str]]:
    """Return the newest complete checkpoint whose files are as they were written.

    Returns:
        The checkpoint, or None if there is no complete one; and a line for each newer checkpoint
        that says what is wrong with it: incomplete, as after a crash, or damaged.

    Raises:
        UserError: if there are complete checkpoints and all of them are damaged.
    """
    troubles, damaged = [], False
    for found in sorted(directory.glob("step-*"), reverse=True):
        if not (found / MANIFEST).exists():
            troubles.append(f"{found} is incomplete")
            continue
        try:
            check_files(found)
        except DamagedError as error:
            troubles.append(str(error))
            damaged = True
        else:
            return found, troubles
    if damaged:
        fix = "restore one of them, or begin again under another --name"
        raise UserError(f"{'; '.join(troubles)}: {fix}")
    return None, troubles


def check_files(checkpoint: Path) -> None:
    """Check that a complete checkpoint's files are as they were written.

    Raises:
        DamagedError: if a file is absent, damaged, of another version or of another checkpoint; the
            message names the file.
    """
    checksums = read_sealed(checkpoint / MANIFEST, format=FORMAT)["checksums"]
    verify(checkpoint, checksums)
    for file in checkpoint.glob("*.safetensors"):  # DCP reads all of them
        if file.name not in checksums:
            raise DamagedError(f"{file} does not belong to its checkpoint")
