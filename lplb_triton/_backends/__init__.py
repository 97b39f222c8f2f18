"""How a `Balancer` computes: tables, workspace and the two back ends."""
