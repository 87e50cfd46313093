"""Record what every module of a network takes and gives, compare two traces, find where they part and why."""

from eridiff.trace.compare import compare
from eridiff.trace.format import Trace, TraceFile, probe, read_trace, write_trace
from eridiff.trace.record import Recording, first_difference, record
from eridiff.trace.report import Report, Row

__all__ = [
    "Recording", "Report", "Row", "Trace", "TraceFile", "compare", "first_difference", "probe", "read_trace", "record",
    "write_trace",
]  # fmt: skip
