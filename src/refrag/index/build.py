"""Building an index so that a build that is refused or stopped never costs the index that was there."""

from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from ..config import IndexSettings
from ..errors import RefragError
from .store import PassageIndex, local_address
from .table import REBUILD, REPLACED, PassageTable, is_remote

if TYPE_CHECKING:
    from ..model import RefragModel


@contextmanager
def building(path: str | Path, model: "RefragModel", settings: IndexSettings, *, rebuild: bool = False) -> Generator[PassageIndex]:
    """The index to add to: the one that is there, else a new one, which is removed again if the block fails with nothing added.

    With `rebuild` a new one, filled beside the one that is there and put in its place when the block ends well; in an object
    store it replaces the old one at once, so read the first passage before. Raises what `open_or_create` and `create` raise.
    """
    address = local_address(path)
    PassageTable.finish_swap(address)
    if PassageTable.exists(address):
        PassageTable.drop(address, REPLACED)  # left by a kill after a rebuild had come into use
    if rebuild and PassageTable.exists(address):
        PassageTable.drop(address, REBUILD)  # of a rebuild that was killed
        try:
            yield PassageIndex.create(address, model, settings, name=REBUILD)
            PassageTable.swap(address)
        finally:
            PassageTable.drop(address, REBUILD)
        return
    is_new = not PassageTable.exists(address) and not is_remote(address)
    made = [folder for folder in (Path(address), *Path(address).parents) if is_new and not folder.exists()]
    index = None
    try:
        index = PassageIndex.create(address, model, settings, rebuild=is_remote(address)) if rebuild else PassageIndex.open_or_create(address, model, settings)
        yield index
    except BaseException:
        with suppress(OSError, RefragError):  # a folder that holds something else stays
            if is_new and index is not None and index.count == 0:
                PassageTable.drop(address)
                for folder in made:
                    folder.rmdir()
        raise
