"""Files on a disk or in a bucket, through one set of functions.

This is the face of the room: whoever is outside imports from here.
"""

from backends.storage.copies import COPIES, LocalCopies, kept_copy, local_copies, scratch_folder
from backends.storage.files import (
    StoredFile,
    create,
    download,
    exists,
    files_in,
    list_remote,
    publish,
    read_bytes,
    remove,
    remove_folder,
    write_bytes_atomic,
)
from backends.storage.lease import Lease, LeaseHeldError, LeaseLostError
from backends.storage.listing import RemoteListing
from backends.storage.locations import Location, as_location, is_remote, is_within, resolved
from backends.storage.matching import list_matching
from backends.storage.parallel import PARALLEL, in_order, in_parallel

__all__ = [
    "COPIES",
    "PARALLEL",
    "Lease",
    "LeaseHeldError",
    "LeaseLostError",
    "LocalCopies",
    "Location",
    "RemoteListing",
    "StoredFile",
    "as_location",
    "create",
    "download",
    "exists",
    "files_in",
    "in_order",
    "in_parallel",
    "is_remote",
    "is_within",
    "kept_copy",
    "list_matching",
    "list_remote",
    "local_copies",
    "publish",
    "read_bytes",
    "remove",
    "remove_folder",
    "resolved",
    "scratch_folder",
    "write_bytes_atomic",
]
