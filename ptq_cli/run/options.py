"""What a run is given besides its plan: the machine, the size of files, somebody who listens."""

from __future__ import annotations

from dataclasses import dataclass

from ptq_cli.core.progress import Listener, nobody
from ptq_cli.run.schedule import ALL_THERE_IS, Resources
from ptq_cli.storage.folder import MAX_SHARD


@dataclass(frozen=True)
class RunOptions:
    """max_shard: bytes of tensors in one weights file"""

    resources: Resources = ALL_THERE_IS
    max_shard: int = MAX_SHARD
    listen: Listener = nobody
