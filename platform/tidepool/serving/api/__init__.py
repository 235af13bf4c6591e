"""The endpoints of the API: what each takes, parsed strictly, and the shapes of its answers. Pure: knows no HTTP and no Ray."""
