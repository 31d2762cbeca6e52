"""Files of ranges: tpu-mlir's calibration table, TensorRT's calibration cache, JSON encodings."""

from __future__ import annotations

from qatkit.tables.calibration_table import (
    CalibrationTable,
    TableEntry,
    read_calibration_table,
    write_calibration_table,
)
from qatkit.tables.encodings import Encoding, Encodings, read_encodings, write_encodings
from qatkit.tables.ranges import calibration_table, encodings, import_ranges, tensorrt_cache
from qatkit.tables.tensorrt_cache import (
    TensorRTCache,
    read_tensorrt_cache,
    write_tensorrt_cache,
)

__all__ = [
    "CalibrationTable",
    "Encoding",
    "Encodings",
    "TableEntry",
    "TensorRTCache",
    "calibration_table",
    "encodings",
    "import_ranges",
    "read_calibration_table",
    "read_encodings",
    "read_tensorrt_cache",
    "tensorrt_cache",
    "write_calibration_table",
    "write_encodings",
    "write_tensorrt_cache",
]
