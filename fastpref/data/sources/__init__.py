"""Where rows lie: files of a folder, the hub, the package itself."""
