"""stub"""
def page(report): return "<html></html>"
