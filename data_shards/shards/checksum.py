"""crc32 of a record's bytes: isal's where it is installed, many times as fast as zlib's, or zlib's.

Both are the same function (ISO 3309), so shards and indexes do not depend on which is there.
"""

try:
    from isal.isal_zlib import crc32 as crc32
except ImportError:  # optional: the extra `fast`
    from zlib import crc32 as crc32
