"""The dress rehearsal: the whole way on a randomized and calibrated model."""
