"""Base layers that can have an adapter; this package does not depend on adapters."""
