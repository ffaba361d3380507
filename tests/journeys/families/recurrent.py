"""Words -> words, by an LSTM that reads in both directions."""

from torch import nn


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(96, 32)
        self.memory = nn.LSTM(32, 32, num_layers=2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(64, 96)
        for weight in self.parameters():
            weight.data.mul_(4)

    def forward(self, input_ids):
        return self.head(self.memory(self.embed(input_ids))[0])


def build():
    return Recurrent()
