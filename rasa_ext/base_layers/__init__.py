"""What an adapter may lie over; knows nothing of adapters."""
