"""Compare LoRAs over one shared basis with separate LoRAs of the same total size."""
