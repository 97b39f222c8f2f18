"""Read an HTML page as a tree, to hold its elements against what they should be."""

from html.parser import HTMLParser

VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """Ids, tags by id, texts by id, and whatever could load something."""

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.texts, self.tags, self.links, self.text = [], {}, {}, [], [], ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append((tag, attrs))
        self.links += [v for k, v in attrs.items() if k in ("src", "href", "data", "srcset")]
        if "id" in attrs:
            assert attrs["id"] not in self.ids
            self.ids[attrs["id"]], self.texts[attrs["id"]] = [], ""
        if tag not in VOID:
            self.open.append((tag, attrs.get("id")))
        for _, name in self.open:
            if name:
                self.ids[name].append((tag, attrs))

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop()[0] == tag

    def handle_data(self, data):
        self.text += data
        for _, name in self.open:
            if name:
                self.texts[name] += data

    def count(self, name, tag, kind=None):
        """Count the elements of a class inside of the element with an id."""
        return sum(
            t == tag and (kind is None or kind in (a.get("class") or "").split())
            for t, a in self.ids[name]
        )
