"""What a choice costs: static bytes, and latencies measured on the device it will run on."""
