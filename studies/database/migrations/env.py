"""What Alembic runs: the revisions, in the transaction of the connection it is given."""

from alembic import context

attributes = context.config.attributes
context.configure(
    connection=attributes["connection"],
    version_table=attributes["version_table"],
    render_as_batch=True,
    transactional_ddl=True,
)
context.run_migrations()
