"""Record what every module of a network takes and gives, compare two recordings, name the first that differs."""

from eridiff.trace.format import Trace, TraceFile, probe, read_trace, write_trace
from eridiff.trace.record import Recording, first_difference, record

__all__ = ["Recording", "Trace", "TraceFile", "first_difference", "probe", "read_trace", "record", "write_trace"]
