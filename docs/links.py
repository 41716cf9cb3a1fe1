"""Names in the text become links: ours to their API entries, those of torch, Pyro and Python to their documentation.

A name in single backticks links when it is public (`InferenceGaps`, `pv.InferenceGaps`, `nn.MLP`) or stands in `addresses`.
"""

from addresses import BUILTINS, OUTSIDE, SHORT, public_name
from docutils import nodes
from sphinx import addnodes
from sphinx.transforms.post_transforms import SphinxPostTransform


def link(address: str, shown: nodes.Node) -> nodes.reference:
    return nodes.reference("", "", shown, refuri=address, internal=False)


class LinkNames(SphinxPostTransform):
    default_priority = 5  # before Sphinx resolves the references that this one adds

    def run(self, **options: object) -> None:
        for literal in list(self.document.findall(nodes.literal)):
            above, parent = [], literal.parent
            while parent is not None:
                above.append(parent)
                parent = parent.parent
            if any(isinstance(node, nodes.reference | nodes.title | addnodes.pending_xref) for node in above):
                continue
            text = literal.astext()
            if name := public_name(text):
                self.replace(literal, name)
            elif (name := SHORT.get(text, text.removesuffix("()"))) in OUTSIDE and name not in BUILTINS:
                literal.replace_self(link(OUTSIDE[name], literal.deepcopy()))

    def replace(self, literal: nodes.literal, name: str) -> None:
        reference = addnodes.pending_xref(
            "", literal.deepcopy(), refdomain="py", reftype="obj", reftarget=name, refexplicit=True, refwarn=False
        )
        reference["refdoc"] = self.env.docname
        literal.replace_self(reference)


def outside(app: object, env: object, node: addnodes.pending_xref, shown: nodes.Node) -> nodes.reference | None:
    """Handler of Sphinx's event `missing-reference`: types in signatures."""
    target = node.get("reftarget", "")
    return link(OUTSIDE[target], shown) if target in OUTSIDE else None
