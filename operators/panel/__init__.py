"""The Influence panel beside the grid."""
