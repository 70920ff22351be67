"""What a cell may measure besides a training run. A measure takes the resolved config and gives names and numbers."""

from lm.claims.measures.decode_cost import decode_cost
from lm.claims.measures.length_cost import length_cost
from lm.claims.measures.preference_cost import preference_cost
from lm.claims.measures.preference_run import preference_run
from lm.claims.measures.scan_error import log_scan_error, scan_error
from lm.claims.measures.table_cost import table_cost

MEASURES = {"decode_cost": decode_cost, "length_cost": length_cost, "log_scan_error": log_scan_error,
            "preference_cost": preference_cost, "preference_run": preference_run, "scan_error": scan_error,
            "table_cost": table_cost}
