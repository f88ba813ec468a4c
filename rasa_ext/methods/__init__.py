"""The methods, one config each: which factors a layer owns and which it gives to its group."""
