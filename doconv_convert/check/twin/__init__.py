"""The float64 twin: the exported network, evaluated where rounding hides nothing."""
