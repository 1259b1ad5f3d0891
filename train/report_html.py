"""The report as one HTML file."""


def render(report) -> str:
  return ""
