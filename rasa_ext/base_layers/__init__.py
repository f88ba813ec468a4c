"""The layers that an adapter may lie over; nothing here knows of adapters."""
