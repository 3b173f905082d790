"""The training step written down plainly, as the paper and its facts say it: what the fast step is measured and tested against."""
import copy

import torch

from twocet_nb.losses import adversarial_loss, code_loss, cycle_loss, diversity_loss, r1_penalty
from twocet_nb.networks import build_networks
from twocet_nb.trainer import draw_codes, make_batches


class Naive:
    """Three networks, three optimisers, two averages, and one iteration of three sub-steps. config: a TrainConfig."""

    def __init__(self, config, device='cpu'):
        self.config, self.device, self.step = config, torch.device(device), 0
        self.G, self.E, self.D = (network.to(device) for network in build_networks(config.network, config.seed).values())
        self.averages = [copy.deepcopy(network) for network in (self.G, self.E)]
        rates = config.lr_generator, config.lr_encoder, config.lr_discriminator
        self.optimizers = [torch.optim.Adam(network.parameters(), lr, (config.beta1, .99), weight_decay=config.weight_decay)
                           for network, lr in zip((self.G, self.E, self.D), rates)]
        self.batches = make_batches(config, self.device)

    def d_loss(self, x_n, x_e, code, weights, both):
        "Equations 1 and 6 with R1."
        with torch.no_grad():
            fakes = {1: self.G(x_n, code)} | ({0: self.G(x_e, torch.zeros_like(code))} if both else {})
        loss = 0
        for face_type, fake in fakes.items():
            real = (x_n, x_e)[face_type].clone().requires_grad_()
            logits = self.D(real, face_type)
            loss += weights[('adv_n', 'adv_e')[face_type]] * (adversarial_loss(logits, True) + adversarial_loss(self.D(fake, face_type), False))
            loss += weights[('adv_n', 'adv_e')[face_type]] * self.config.losses.r1 * r1_penalty(logits, real)
        return loss

    def g_loss(self, x_n, x_e, code, code_2, weights, both):
        "Equations 5 and 8."
        zero, fake = torch.zeros_like(code), self.G(x_n, code)
        terms = dict(adv_e=adversarial_loss(self.D(fake, 1), True), cyc_n=cycle_loss(x_n, self.G(fake, zero)),
                     code=code_loss(code, self.E(fake)), ds=-diversity_loss(fake, self.G(x_n, code_2).detach(), code, code_2))
        if both:
            fake = self.G(x_e, zero)
            terms |= dict(adv_n=adversarial_loss(self.D(fake, 0), True), cyc_e=cycle_loss(x_e, self.G(fake, self.E(x_e))))
        return sum(weights[name] * term for name, term in terms.items())

    def descend(self, loss, *optimizers):
        for optimizer in self.optimizers: optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers: optimizer.step()
        return loss.item()

    def train_step(self):
        "One iteration; returns the losses of its sub-steps, D's and that of G and E."
        losses, weights = [], self.config.losses.weights(self.step)
        for k, both in enumerate((True, True, False)):
            number = 3 * self.step + k
            (x_n, x_e), (code, code_2) = self.batches[number], draw_codes(self.config, number, self.device)
            losses.append((self.descend(self.d_loss(x_n, x_e, code, weights, both), self.optimizers[2]),
                           self.descend(self.g_loss(x_n, x_e, code, code_2, weights, both), *self.optimizers[:2])))
        with torch.no_grad():
            for network, average in zip((self.G, self.E), self.averages):
                for now, mean in zip(network.parameters(), average.parameters()):
                    mean.copy_(self.config.ema_decay * mean + (1 - self.config.ema_decay) * now)
        self.step += 1
        return losses
