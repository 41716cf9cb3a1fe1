"""pip install lightning; python train_lightning.py"""

import lightning
import torch
from torch.utils.data import DataLoader, TensorDataset

import pyro_vae as pv


class LitVAE(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.vae = pv.mlp_vae(16, latent_dim=2, likelihood=pv.nn.Normal("learned"))
        self.objective = pv.BetaTraceMeanField_ELBO(beta=pv.LinearAnnealing(60))
        # Its state holds num_updates, and so does the checkpoint.
        self.loss = self.objective(self.vae.model, self.vae.guide)

    def training_step(self, batch, batch_idx):
        self.objective.num_updates = self.global_step  # for the schedule of beta
        loss = self.loss(batch[0])
        terms = self.objective.terms
        self.log_dict({"loss": loss, "elbo": terms.elbo, "beta": terms.beta})
        return loss

    def configure_optimizers(self):
        return torch.optim.Adam(self.loss.parameters(), lr=1e-2)


if __name__ == "__main__":
    lightning.seed_everything(0)
    data = TensorDataset(torch.randn(400, 2) @ torch.randn(2, 16))
    loader = DataLoader(data, batch_size=20, shuffle=True)
    module = LitVAE()
    options = {"accelerator": "cpu", "logger": False}
    options |= {"enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(max_epochs=5, default_root_dir="lightning", **options)
    trainer.fit(module, loader)
    trainer.save_checkpoint("lightning/half.ckpt")

    # Later: it goes on with the parameters, the optimiser and the update of beta.
    trainer = lightning.Trainer(max_epochs=10, default_root_dir="lightning", **options)
    trainer.fit(module, loader, ckpt_path="lightning/half.ckpt")
    estimator = pv.AdaptiveImportanceSampling(module.vae.model, module.vae.guide)
    print(pv.evaluate(estimator, DataLoader(data, batch_size=100)).mean())
