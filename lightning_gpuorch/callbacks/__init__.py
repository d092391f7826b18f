"""Callbacks for Trainer and Fabric."""
