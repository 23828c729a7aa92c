"""Every setsockopt, the original destination, namespaces, capabilities. Standard library only; policy lives elsewhere."""
