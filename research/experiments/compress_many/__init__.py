"""LoRAs over one shared basis beside LoRAs apart of the same size."""
