"""Record what every module of a network gives, compare two recordings, name the first that differs."""

from eridiff.trace.record import Recording, first_difference, record

__all__ = ["Recording", "first_difference", "record"]
