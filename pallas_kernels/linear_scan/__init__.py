from pallas_kernels.linear_scan.api import linear_scan as linear_scan
from pallas_kernels.linear_scan.gated import min_gru as min_gru
from pallas_kernels.linear_scan.gated import min_lstm as min_lstm
